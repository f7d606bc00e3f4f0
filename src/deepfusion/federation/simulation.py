"""A federation on one machine: the same two apps under Flower's simulation engine, for fleets of any size.

What a real federation has is here too: each device's folder with its own text and key, signed manifests, the inbox and
its door. What is not: processes of their own (devices take turns in a few of Ray's), the network, and with it TLS and
the check of a node's key. In their place the engine's nodes are registered with the devices' public keys, as
`flwr supernode register` does, so that the server finds out who is who as ever; and a node finds its device's folder by
the number that the engine gives it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import ray
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    HEARTBEAT_INTERVAL_INF,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    PARTITION_ID_KEY,
    RUN_ID_NUM_BYTES,
    SUPERLINK_NODE_ID,
)
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.fleet.vce.vce_api import start_vce
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from deepfusion import pipeline
from deepfusion.config import Recipe, Runtime
from deepfusion.engine import StepError
from deepfusion.errors import InputError
from deepfusion.federation import device, server
from deepfusion.federation.project import DEVICE, HERE, Project, init, node_keys
from deepfusion.phases.data import build_corpus
from deepfusion.store import link
from deepfusion.worker import preload

WEEK = 7 * 24 * 3600.0
WAITING = 8  # messages to devices, for each process of them, that are on their way at a time
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # and would warn of what it is going to change
    "RAY_worker_niceness": "0",  # training is the work here, and does not yield to all else, as by default
}
TASK = 1  # there is one, and it needs a number


def simulate(root: Path, recipe: Recipe, fields: dict[str, Any], runtime: Runtime) -> Project:
    """Run a recipe as a federation of the devices that its own `data.partition` makes, in one folder.

    A folder that was made for the same recipe is gone on with: uploads that are there stay, and so do trained models.

    Args:
        root: the federation's folder: new, empty, or of a simulation of the same recipe.
        recipe: what to run. A `federation` section may say how uploads are collected; its devices are those of the
            partition, and they are waited for until the last is decided about. Its quorum, or else as many as there
            are clusters, must be accepted.
        fields: the recipe as it is written down.
        runtime: as many devices at a time as it has workers, but at least one; the server's steps are after them.

    Raises:
        InputError: the folder is in use for something else, or the recipe cannot be run by a federation.
    """
    project = enrol(root, recipe, fields, runtime)
    chosen = Recipe.load(project.recipe)
    assert chosen.federation is not None
    _run(project, chosen.federation.devices, runtime)
    return project


def enrol(root: Path, recipe: Recipe, fields: dict[str, Any], runtime: Runtime) -> Project:
    """Make a federation's folder with its devices, each of which has its text, its key and its ancestor.

    Raises:
        InputError: as `simulate`.
    """
    project = Project(root)
    with tempfile.TemporaryDirectory(prefix="deepfusion-") as scratch:
        corpus = build_corpus(recipe.data, seed=recipe.seed, into=Path(scratch))
        names = [one.id for one in corpus.devices]
        fields = fields | {"federation": _everybody(recipe, fields.get("federation") or {}, names)}
        chosen = Recipe.parse(fields, origin=recipe.name)
        if not project.recipe.is_file():
            init(root, chosen, fields, HERE, 8000)
        elif Recipe.load(project.recipe) != chosen:
            raise InputError(f"{root} is of another recipe: give another folder")
        for name in names:
            link(corpus.private(name), project.device(name) / "documents.jsonl")
    for order in pipeline.prepare(chosen, project.run, runtime).orders:
        folder = project.device(order.device)
        copy = os.path.relpath(order.ancestor.folder, folder)
        known = {"name": order.device, "documents": "documents.jsonl", "ancestors": {order.name: copy}}
        text = yaml.safe_dump(known | {"threads": runtime.threads}, sort_keys=False)
        (folder / DEVICE).write_text(text, encoding="utf-8")
    return project


def _everybody(recipe: Recipe, said: dict[str, Any], devices: Sequence[str]) -> dict[str, Any]:
    """The section `federation` of a fleet that is waited for to the last device, and of which some may fail."""
    federation = {"quorum": recipe.cluster.k, "deadline_s": WEEK} | said | {"devices": list(devices)}
    return federation | {"grace_s": federation["deadline_s"]}


class _Client(ClientApp):
    """The ClientApp of `device`, told by the number of its node which device's file is its own."""

    def __init__(self, project: Project, devices: Sequence[str]) -> None:
        super().__init__()
        self.project, self.devices = project, tuple(devices)

    def __call__(self, message: Message, context: Context) -> Message:
        _prepared()
        name = self.devices[int(context.node_config[PARTITION_ID_KEY])]
        context.node_config["file"] = str(self.project.device(name) / DEVICE)
        return device.app(message, context)


@cache
def _prepared() -> None:
    """Once in each of Ray's processes, in which device follows device."""
    preload()


class Grid(InMemoryGrid):
    """Reaches the engine's nodes, a few at a time: the engine looks through all that is on its way for each node, and
    memory holds the replies.
    """

    def __init__(self, states: LinkStateFactory, most: int) -> None:
        super().__init__(states)
        self.most, self.engine = most, Future[None]()

    def get_nodes(self) -> Iterable[Any]:
        """The nodes.

        Raises:
            StepError: the engine has ended, and nobody would ever answer.
        """
        if self.engine.done():
            raise StepError(f"Flower's simulation engine has ended: {self.engine.exception()}")
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; what is one too many is not sent, and has no name."""
        waiting = len(cast("InMemoryLinkState", self.state).message_ins_store)
        return super().push_messages(messages) if waiting < self.most else []


def _run(project: Project, devices: Sequence[str], runtime: Runtime) -> None:
    """Start the engine, and in this thread the ServerApp; the one ends with the other."""
    processes = max(1, runtime.workers)
    states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = cast("InMemoryLinkState", states.state())
    run = Run.create_empty(generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.federation_id, run.primary_task_id = NOOP_FEDERATION_ID, TASK
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[TASK] = Task(task_id=TASK, run_id=run.run_id)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, SUPERLINK_NODE_ID, TASK
    partition: dict[int, int] = {}
    for number, key in enumerate(node_keys(project.keys, devices)):
        node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, heartbeat_interval=HEARTBEAT_INTERVAL_INF)
        state.acknowledge_node_heartbeat(node, HEARTBEAT_INTERVAL_INF)
        partition[node] = number
    grid = Grid(states, WAITING * processes)
    grid.set_run(run)
    configured: UserConfig = {"folder": str(project.root), "workers": runtime.workers}
    context = Context(run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), configured)
    stop = threading.Event()
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    ray.init(num_cpus=processes, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with ThreadPoolExecutor(1) as pool:
        grid.engine = pool.submit(
            start_vce, backend_name="ray", backend_config_json_stream='{"client_resources": {"num_cpus": 1}}',
            app_dir=".", is_app=False, f_stop=stop, run=run, metrics=VceMetrics(),
            client_app=_Client(project, devices), state_factory=states, existing_nodes_mapping=partition,
        )  # fmt: skip
        try:
            server.app(grid, context)
        finally:
            stop.set()
    grid.engine.result()
