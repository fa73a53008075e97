"""The methods, one file each. The registry is torch-free: a class is imported when it is asked for."""

ALGORITHMS: dict[str, str] = {
    "fedavg": "fedtail.algorithms.fedavg:FedAvg",
    "fedprox": "fedtail.algorithms.fedprox:FedProx",
    "scaffold": "fedtail.algorithms.scaffold:Scaffold",
    "fednova": "fedtail.algorithms.fednova:FedNova",
    "fedopt": "fedtail.algorithms.fedopt:FedOpt",
    "feddyn": "fedtail.algorithms.feddyn:FedDyn",
    "climb": "fedtail.algorithms.climb:CLIMB",
    "fedrl": "fedtail.algorithms.fedrl:FedRL",
    "crt": "fedtail.algorithms.crt:CRT",
    "ccvr": "fedtail.algorithms.ccvr:CCVR",
    "creff": "fedtail.algorithms.creff:CReFF",
    "post_hoc": "fedtail.algorithms.posthoc:PostHoc",
    "fedgrab": "fedtail.algorithms.fedgrab:FedGraB",
    "fedloge": "fedtail.algorithms.fedloge:FedLoGe",
    "eqlv2": "fedtail.algorithms.eqlv2:EQLv2",
    "fedga": "fedtail.algorithms.fedga:FedGA",
    "fedlc": "fedtail.algorithms.fedlc:FedLC",
    "fedrs": "fedtail.algorithms.fedrs:FedRS",
    "fedntd": "fedtail.algorithms.fedntd:FedNTD",
    "moon": "fedtail.algorithms.moon:MOON",
    "feddecorr": "fedtail.algorithms.feddecorr:FedDecorr",
    "fedsam": "fedtail.algorithms.fedsam:FedSAM",
}
"""From the name used in configurations to module:Class."""
