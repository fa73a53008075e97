"""ClientApp: one epoch on the node's data."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the model that came and send it back."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader = load(context.node_config["data"], context.run_config["batch-size"])
    loss = train(net, loader, message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(content=RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)
