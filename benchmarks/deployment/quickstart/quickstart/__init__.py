"""Flower's own FedAvg, beside which fedtail's deployment is measured; nothing of fedtail is imported."""
