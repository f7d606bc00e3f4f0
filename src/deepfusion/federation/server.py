"""The ServerApp: it gives each device its order, collects uploads until quorum or deadline, and runs the method.

It works in the folder that `deepfusion federation init` made, from which `flower-superlink` is started. What it has
collected is in `inbox/` there; killed and run again, it goes on with that.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler

from deepfusion import pipeline
from deepfusion.artifacts import Upload
from deepfusion.config import Federation, Recipe, Runtime
from deepfusion.errors import InputError, one_line
from deepfusion.federation import messages
from deepfusion.federation.inbox import Inbox, started
from deepfusion.federation.lines import Lines, print_line
from deepfusion.federation.messages import ORDER, PIECE, VERDICT, Order, Reply
from deepfusion.federation.news import WAITED_FOR, News, Standing
from deepfusion.federation.project import Project, node_keys
from deepfusion.labels import METRICS
from deepfusion.phases.upload import Door
from deepfusion.pipeline import Fleet, Received
from deepfusion.steps import sent_by

BESIDE_WEIGHTS = 2**26  # bytes of an upload beside its weights: config, tokenizer, headers
POLL_S = 1.0
app = ServerApp()


# ── collecting ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Net(Protocol):
    """What collecting needs of Flower's `Grid`."""

    def get_nodes(self) -> Any:
        """The nodes that are there."""
        ...

    def push_messages(self, messages: Any) -> Any:
        """Send; names of the messages, None for one that cannot be sent, and no names at all if no more is taken."""
        ...

    def pull_messages(self, message_ids: Any) -> Any:
        """Replies that have come."""
        ...


@dataclass(frozen=True)
class Sent:
    """A message that is not answered yet."""

    id: str
    kind: str
    at: float
    activated: str  # when its node was last activated: a node that has come again since has lost the message


@dataclass
class Talk:
    """How far the server is with one device."""

    device: str
    sent: Sent | None = None
    told: bool = False
    troubles: list[str] = field(default_factory=list[str])
    losses: int = 0  # messages lost on the way since the last that brought something
    not_before: float = 0.0
    here: bool = False
    seen: bool = False  # since this server began to collect
    given_up: bool = False  # for this time: whoever mends the device and collects again is to find the door open


class Collector:
    """Collects the uploads of a fleet.

    Args:
        net: reaches the devices.
        config: the recipe's federation.
        orders: device → its order.
        texts: the public text that goes with an order, by the file's name.
        inbox: where uploads arrive.
        devices_of: public key of a node → the device.
        say: told of all that happens, line by line.
    """

    def __init__(
        self,
        net: Net,
        config: Federation,
        orders: Mapping[str, Order],
        texts: Mapping[str, bytes],
        inbox: Inbox,
        devices_of: Mapping[bytes, str],
        say: Callable[[str], None],
    ) -> None:
        self.net, self.config, self.orders, self.texts = net, config, orders, texts
        self.inbox, self.devices_of, self.say = inbox, devices_of, say
        self.packed = messages.pack(texts)
        self.talks = {device: Talk(device) for device in orders}

    def collect(self, deadline: float, now: Callable[[], float] = time.time, rest: float = POLL_S) -> None:
        """Until every device is decided about, or there is a quorum and the others had their time, or the deadline."""
        self.settle()
        enough_since: float | None = None
        news = News(self.say)
        while True:
            self.step(now())
            standing = self.standing()
            states = [one.state for one in standing.values()]
            if not set(states) & set(WAITED_FOR) or now() >= deadline:
                break
            if states.count("accepted") >= self.config.quorum:
                enough_since = now() if enough_since is None else enough_since
                if now() - enough_since >= self.config.grace_s:
                    break
            end = deadline if enough_since is None else min(deadline, enough_since + self.config.grace_s)
            news.tell(standing, now(), end, quorum=enough_since is not None)
            time.sleep(rest)

    def settle(self) -> None:
        """Decide about uploads that were whole when a server was killed, before it had decided."""
        for device, talk in self.talks.items():
            wanted = self.inbox.wanted(device)
            if wanted is not None and wanted.offset == wanted.size and not self._decided(talk):
                self._settle(device)

    def tell(self, seconds: float, now: Callable[[], float] = time.time, rest: float = POLL_S) -> None:
        """Tell the devices that are there what became of their uploads, for a while."""
        end = now() + seconds
        while now() < end and any(talk.sent or not talk.told for talk in self.talks.values() if self._decided(talk)):
            if not self.step(now(), only_verdicts=True):
                break
            time.sleep(rest)

    def step(self, now: float, *, only_verdicts: bool = False) -> bool:
        """Hear every device that has answered, and say the next thing to all that are there; whether any is."""
        nodes: dict[str, Any] = {}
        for node in self.net.get_nodes():
            if (device := self.devices_of.get(bytes(node.public_key))) in self.talks:
                nodes[device] = node
        busy = full = False
        for device, talk in self.talks.items():
            talk.here = device in nodes
            talk.seen = talk.seen or talk.here
            self._hear(talk, nodes.get(device), now)
            if device in nodes and talk.sent is None and now >= talk.not_before and not talk.given_up and not full:
                if only_verdicts and not self._decided(talk):
                    continue
                full = not self._say_next(talk, nodes[device], now)
            busy = busy or (talk.sent is not None and (not only_verdicts or self._decided(talk)))
        return busy

    def standing(self) -> dict[str, Standing]:
        """How far each device is."""
        return {device: self._stands(talk) for device, talk in self.talks.items()}

    def _stands(self, talk: Talk) -> Standing:
        if verdict := self.inbox.verdict(talk.device):
            return Standing(verdict.state)
        if talk.given_up:
            return Standing("given up")
        wanted = self.inbox.wanted(talk.device)
        share = f"{wanted.offset / wanted.size:.0%}" if wanted and wanted.size else ""
        if not talk.here:
            return Standing("gone" if talk.seen else "never connected", share)
        if wanted:
            return Standing("sending", share)
        return Standing("to mend" if talk.troubles and talk.sent is None else "training")

    def received(self) -> Received:
        """What there is for the method, and why the others are left out."""
        uploads: dict[str, Upload] = {}
        failures: dict[str, str] = {}
        for device, talk in self.talks.items():
            verdict = self.inbox.verdict(device)
            if verdict and verdict.state == "accepted":
                uploads[device] = self.inbox.upload(device)
            elif verdict:
                failures[device] = verdict.reason.removeprefix(f"device {device}: ")  # the report says whose it is
            elif talk.troubles:
                failures[device] = talk.troubles[-1]
            elif wanted := self.inbox.wanted(device):
                failures[device] = f"only {wanted.offset} of {wanted.size} bytes had come when collecting ended"
            else:
                failures[device] = "it sent nothing while uploads were collected"
        return Received(uploads, failures, {device: self.inbox.wire(device) for device in self.talks})

    def _decided(self, talk: Talk) -> bool:
        return self.inbox.verdict(talk.device) is not None

    def _hear(self, talk: Talk, node: Any, now: float) -> None:
        if (sent := talk.sent) is None:
            return
        for reply in self.net.pull_messages([sent.id]):  # one at a time: memory holds one piece
            talk.sent = None
            self.inbox.carried(talk.device, up=messages.size(reply))
            self._take(talk, sent, reply, now)
            return
        lost = node is not None and node.last_activated_at != sent.activated
        if lost or (sent.kind != ORDER and now - sent.at > self.config.patience_s):
            talk.sent = None

    def _take(self, talk: Talk, sent: Sent, message: Message, now: float) -> None:
        device = talk.device
        if message.has_error():
            talk.losses += 1
            self._put_off(talk, f"lost on the way ({one_line(str(message.error.reason), 200)})", talk.losses, now)
            return
        try:
            reply = Reply.read(message)
            if sent.kind == VERDICT:
                talk.told = True
            elif reply.failed:
                self._trouble(talk, reply.failed, now)
            else:
                self._keep(device, reply)
                talk.losses = 0
        except ValueError as fault:
            self._trouble(talk, str(fault), now)

    def _keep(self, device: str, reply: Reply) -> None:
        before = self.inbox.wanted(device)
        if (said := reply.announcement) is not None:
            self.inbox.announce(device, self.orders[device].digest, said.manifest, said.signature)
        if (piece := reply.piece) is not None:
            self.inbox.add(device, piece.of, piece.offset, piece.content)
        wanted = self.inbox.wanted(device)
        if wanted is None:
            return
        if before is not None and wanted.digest == before.digest and wanted.offset == before.offset:
            raise ValueError("it answers without the bytes that it was asked for")
        self.say(f"{device}: {wanted.offset:,} of {wanted.size:,} bytes")
        if wanted.offset == wanted.size and not self._settle(device):
            raise ValueError("its bytes are not those that it announced")

    def _settle(self, device: str) -> bool:
        """Decide about a whole upload; false: its bytes are not those that were announced, and are asked for again."""
        if verdict := self.inbox.settle(device):
            self.say(f"{device}: {verdict.state}{': ' * bool(verdict.reason)}{verdict.reason}")
        return verdict is not None

    def _trouble(self, talk: Talk, reason: str, now: float) -> None:
        talk.troubles.append(reason)
        self._put_off(talk, reason, len(talk.troubles), now)

    def _put_off(self, talk: Talk, reason: str, times: int, now: float) -> None:
        """Ask a device again later, the later the more often something went wrong; too often: not again."""
        self.say(f"{talk.device}: {reason}")
        if times >= self.config.attempts:
            talk.given_up = True
            self.say(f"{talk.device} is given up after {self.config.attempts} attempts: mend it, and collect again")
        talk.not_before = now + min(self.config.patience_s, 2.0**times)

    def _say_next(self, talk: Talk, node: Any, now: float) -> bool:
        """Say the next thing to a device; false: the net takes no more for now."""
        device = talk.device
        if verdict := self.inbox.verdict(device):
            if talk.told:
                return True
            kind, content = VERDICT, messages.verdict(verdict.state, verdict.reason)
        elif wanted := self.inbox.wanted(device):
            kind, content = PIECE, messages.ask(wanted.digest, wanted.offset, self.config.piece_bytes)
        else:
            kind, content = ORDER, messages.order(self.orders[device], self.packed)
        message = Message(content, dst_node_id=node.node_id, message_type=kind)
        size = messages.size(message)
        names = list(self.net.push_messages([message]))
        for sent in names:
            if sent is not None:
                talk.sent = Sent(sent, kind, now, node.last_activated_at)
                self.inbox.carried(device, down=size)
        return bool(names)


# ── the app ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def collector(net: Net, project: Project, recipe: Recipe, fleet: Fleet, say: Callable[[str], None]) -> Collector:
    """A collector for a project's recipe, with everything that it needs."""
    config = recipe.federation
    if config is None:
        raise InputError(f"{project.recipe} has no `federation` section")
    texts = {path.name: path.read_bytes() for path in (fleet.corpus.public, fleet.corpus.questions)}
    named = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    orders = {
        one.device: Order(
            run=recipe.name,
            device=one.device,
            seed=one.seed,
            ancestor=one.name,
            lineage=one.ancestor.lineage,
            made=recipe.models.ancestors[one.name].make,
            made_seed=one.made_seed,
            phase=recipe.device.of(one.device),
            piece_bytes=config.piece_bytes,
            texts=named,
        )
        for one in fleet.orders
    }
    ancestors = {one.name: one.ancestor for one in fleet.orders}

    door = Door(recipe.device.embedding_bytes, ancestors, **sent_by(recipe.device))

    def check(upload: Upload) -> None:
        door.look(upload, project.inbox / "unpacked")

    most = {one.device: 4 * one.ancestor.parameters + BESIDE_WEIGHTS for one in fleet.orders}
    inbox = Inbox(project.inbox, project.keys, check, most)
    return Collector(net, config, orders, texts, inbox, node_keys(project.keys, config.devices), say)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Collect, and run the method on what was accepted; what is the user's to mend is told in one line, the last."""
    try:
        fuse(grid, context)
    except ValueError as error:
        line = f"error: {' '.join(str(error).split())}"
        logging.getLogger("flwr").addFilter(without_traceback)
        add_exit_handler(lambda: print_line(line))  # called first of all, before Flower's own sends the log away
        raise


def without_traceback(record: logging.LogRecord) -> bool:
    """Flower logs whatever an app raises with its traceback, which is of no use to whoever has to mend a recipe."""
    if record.exc_info and isinstance(record.exc_info[1], ValueError):
        record.exc_info = None
    return True


def fuse(grid: Grid, context: Context) -> None:
    """Collect uploads for the folder in which this is run, and make an MoE of them.

    Raises:
        ValueError: one line about what the user can mend.
    """
    project = Project(Path(str(context.run_config.get("folder", "."))).absolute())
    recipe = Recipe.load(project.recipe)
    runtime = Runtime(workers=int(context.run_config.get("workers", 1)))
    again = float(context.run_config.get("deadline-s", 0))
    with Lines() as watch:
        fleet = pipeline.prepare(recipe, project.run, runtime, watch)
        collecting = collector(grid, project, recipe, fleet, print_line)
        assert recipe.federation is not None
        begun = time.time() if again else started(project.inbox, time.time())
        collecting.collect(begun + (again or recipe.federation.deadline_s))
        collecting.tell(recipe.federation.patience_s)
        received = collecting.received()
        for device, reason in received.failures.items():
            print_line(f"{device} is left out: {reason}")
        if len(received.uploads) < recipe.federation.quorum:
            raise InputError(
                f"{len(received.uploads)} uploads are accepted, and federation.quorum is {recipe.federation.quorum}: "
                "mend the devices that are left out, and run it again (after the deadline with --run-config "
                "deadline-s=3600), or lower the quorum"
            )
        report = pipeline.run(recipe, project.run, runtime, watch, received=received)
        print_line(f"done: {in_words(report.headline)}")
        print_line(f"model {project.run / 'moe'}, report {project.run / 'report.html'}; deepfusion show {project.run}")


def in_words(headline: Mapping[str, float]) -> str:
    """The few numbers of a run as people read them."""
    found = [f"{called} {headline[name]:.3f}" for name, called in METRICS.items() if name in headline]
    if (base := headline.get("base_token_accuracy")) is not None:
        found.append(f"the base's token accuracy {base:.3f}")
    return ", ".join(found) or "the test asks nothing that could be measured"
