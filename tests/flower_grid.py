"""A grid without processes: nodes that answer at once, late, wrongly or not at all."""

from types import SimpleNamespace

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtail.flower.node import Node
from fedtail.flower.roster import Options


class Client(Node):
    """A node whose data are at hand."""

    def __init__(self, experiment, data, client, options):
        self.experiment, self.data, self.client, self.options, self.config = experiment, data, client, options, {}
        self.memory = RecordDict()


class Grid:
    """Nodes by number (100 + client at first); `behave` may change what one answers."""

    def __init__(self, clients):
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.nodes = {100 + c.client: c for c in clients}
        self.behave = {}  # node -> function(records or None, content) -> records, an Exception, or None: no answer
        self.judge = {}  # node -> what it answers when it is asked to evaluate
        self.sent, self._replies, self._count = [], {}, 0

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message: Message):
        self._count += 1
        number, node = f"m{self._count}", message.metadata.dst_node_id
        if node not in self.nodes:
            return None
        kind, content = message.metadata.message_type, message.content
        self.sent.append((kind, node, content))
        client = self.nodes[node]
        try:
            records = {"hello": client.hello()} if kind == "query" else getattr(client, kind)(content, client.memory)
            if kind == "evaluate" and node in self.judge:
                records = self.judge[node]
            if kind == "train" and node in self.behave:
                records = self.behave[node](records, content)
        except Exception as error:
            records = error
        if records is not None:
            self._replies[number] = records
        return number

    def pull_messages(self, ids):
        return [self._reply(number, self._replies.pop(number)) for number in list(ids) if number in self._replies]

    @staticmethod
    def _reply(number, records):
        bad = isinstance(records, Exception)
        return SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=number), content=records, has_content=lambda: not bad,
            has_error=lambda: bad, error=SimpleNamespace(code=2, reason=str(records) if bad else ""),
        )  # fmt: skip


def deployed(experiment, data, options=None):
    """Returns (grid, roster, engine maker) of an experiment whose clients are all there."""
    from fedtail.flower.engine import FlowerEngine
    from fedtail.flower.roster import Roster

    options = options or Options()
    grid = Grid([Client(experiment, data, k, options) for k in range(data.clients)])
    roster = Roster(grid, options)
    return grid, roster, lambda names, setting: FlowerEngine(names, setting, roster)
