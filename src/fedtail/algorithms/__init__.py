"""The methods, one file each. The registry is torch-free: a class is imported when it is asked for."""

ALGORITHMS: dict[str, str] = {
    "fedavg": "fedtail.algorithms.fedavg:FedAvg",
    "fedprox": "fedtail.algorithms.fedprox:FedProx",
    "scaffold": "fedtail.algorithms.scaffold:Scaffold",
    "fedgrab": "fedtail.algorithms.fedgrab:FedGraB",
}
"""From the name used in configurations to module:Class."""
