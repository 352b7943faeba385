"""`Workspace(transport=...)` with an object: the example of docs/transports.md, and what ranks that give objects agree on."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.transports.base import StepTensors, Transport, TransportSettings
from tokenferry.transports.opening import open_transport
from tokenferry.transports.wrapper import TransportWrapper

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
DOCUMENT = Path(__file__).parent.parent / "docs" / "transports.md"


def test_the_example_of_the_document_says_what_it_says_there() -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(DOCUMENT), "exec"), {"__name__": "example"})
    assert said.getvalue().strip() == code.strip().splitlines()[-1].split("# ")[1]


class Recording:
    """Opens `inner` and notes what is called on it, whole calls and halves alike."""

    def __init__(self, inner: str, name: str = "recording") -> None:
        self.inner, self.name = inner, name
        self.settings: list[TransportSettings] = []
        self.calls: list[str] = []

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        self.settings.append(settings)
        return RecordingTransport(open_transport(self.inner, settings, step_tensors), self.calls)


class RecordingTransport(TransportWrapper):
    def __init__(self, inner: Transport, calls: list[str]) -> None:
        super().__init__(inner)
        self.calls = calls

    def begin_step(self, *args: Any) -> None:
        self.calls.append("begin_step")
        super().begin_step(*args)

    def dispatch(self, *args: Any) -> Any:
        self.calls.append("dispatch")
        return super().dispatch(*args)

    def combine(self, *args: Any) -> torch.Tensor:
        self.calls.append("combine")
        return super().combine(*args)

    def close(self) -> None:
        self.calls.append("close")
        super().close()


def round_trip(ws: tf.Workspace) -> list[float]:
    layer = ws.dispatcher()
    ws.begin_step(2)
    rows = torch.full((2, 8), 1.0 + ws.group.rank)
    got = layer.dispatch(rows, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    return layer.combine(got.hidden / ws.group.size)[:, 0].tolist()


def recorded(group: tf.EPGroup, inner: str) -> dict[str, Any]:
    recording = Recording(inner)
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=recording, timeout_s=20.0) as ws:
        sums = round_trip(ws)
        ws.reset()
        sums += round_trip(ws)
    return {
        "sums": sums,
        "transport": ws.transport,
        "decisions": [str(decision) for decision in ws.decisions],
        "calls": recording.calls,
        "names": [settings.name for settings in recording.settings],
    }


KINDS = [
    pytest.param("local", 1, {}, id="local"),
    pytest.param("collective", 2, {}, id="collective", marks=pytest.mark.ranks),
    pytest.param("p2p", 2, {"TRITON_INTERPRET": "1"}, id="p2p", marks=pytest.mark.interpreter),
]


def graph_steps(group: tf.EPGroup, transport: str) -> list[list[float]]:
    """A runner's steps, in a bucket and beyond the largest, while each rank brings another number of rows."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=Recording(transport), timeout_s=20.0) as ws:
        layer = ws.dispatcher()

        def forward(rows: torch.Tensor) -> torch.Tensor:
            ids, weights = torch.zeros(len(rows), 1, dtype=torch.int32), torch.ones(len(rows), 1)
            return layer.combine(layer.dispatch(rows, ids, weights).hidden / group.size)

        runner = tf.GraphRunner(ws, forward, [4], inputs=[torch.empty(0, 8)])
        return [runner(torch.full((count, 8), 1.0 + group.rank))[:, 0].tolist() for count in (1 + group.rank, 6 - group.rank)]


@pytest.mark.ranks
def test_a_graph_runner_knows_from_the_transport_that_its_counts_pass_through_the_host(on_ranks: RankPools) -> None:
    """Not from its name, which is the object's own."""
    assert on_ranks(graph_steps, 2, "collective") == [[[1.0], [1.0] * 6], [[2.0] * 2, [2.0] * 5]]


DEBUG = pytest.mark.parametrize("debug", [{}, {"TOKENFERRY_DEBUG": "1"}], ids=["plain", "in-debug-mode"])


@DEBUG
@pytest.mark.parametrize(("inner", "ranks", "env"), KINDS)
def test_an_object_opens_anew_at_each_reset_and_gets_every_call(
    on_ranks: RankPools, inner: str, ranks: int, env: dict[str, str], debug: dict[str, str]
) -> None:
    for rank, seen in enumerate(on_ranks(recorded, ranks, inner, env={**env, **debug})):
        assert seen["sums"] == [1.0 + rank] * 4
        assert seen["transport"] == "recording"
        assert seen["decisions"] == ["recording: accepted, a transport object, as asked for"]
        assert seen["calls"] == ["begin_step", "dispatch", "combine", "close"] * 2
        assert len(set(seen["names"])) == 2


@pytest.mark.parametrize(
    "wrong",
    [3, None, object(), Recording, type("Nameless", (), {"open": print})(), type("Named", (), {"name": "named"})()],
    ids=["number", "none", "object", "class", "no-name", "no-open"],
)
def test_what_is_neither_a_name_nor_opens_is_refused(wrong: object) -> None:
    with pytest.raises(tf.ConfigError, match=r"transport must be 'auto' or one of .*, or an object with a name .* open\("):
        tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport=wrong)


class Returning:
    """Opens nothing: returns what it was given."""

    name = "returning"

    def __init__(self, returned: object) -> None:
        self.returned = returned

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Any:
        return self.returned


@pytest.mark.parametrize("returned", [None, 3], ids=["nothing", "a-number"])
def test_an_object_that_opens_no_transport_is_told_so(returned: object) -> None:
    with pytest.raises(tf.ConfigError, match=rf"'returning' .* its open\(\) returned {returned}, which is no open Transport"):
        tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport=Returning(returned))


def opened_within(group: tf.EPGroup, inner: str, timeout_s: float) -> str:
    try:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=Recording(inner), timeout_s=timeout_s).close()
    except tf.TokenferryError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("inner", "ranks", "env", "timeout_s", "said"),
    [
        pytest.param("auto", 1, {}, 20.0, "ConfigError: .* transport must be one of local, p2p, nvls, collective", id="auto"),
        pytest.param(
            "local", 2, {}, 20.0, "TransportUnavailableError: .* the group has 2 ranks", id="local", marks=pytest.mark.ranks
        ),
        pytest.param(
            "p2p",
            1,
            {"TRITON_INTERPRET": "1"},
            3600.0,
            "ConfigError: .* timeout_s is 3600.0 on rank 0, but 1800.0 at most",
            id="p2p",
            marks=pytest.mark.interpreter,
        ),
    ],
)
def test_what_an_object_opens_within_is_checked_as_if_asked_for_by_name(
    on_ranks: RankPools, inner: str, ranks: int, env: dict[str, str], timeout_s: float, said: str
) -> None:
    for text in on_ranks(opened_within, ranks, inner, timeout_s, env=env):
        assert re.match(said, text.replace("\n", " ")), text


def differing(group: tf.EPGroup, transports: list[Any]) -> str:
    with pytest.raises(tf.ConfigError) as caught:
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transports[group.rank], open_timeout_s=10.0)
    return str(caught.value)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("transports", "said"),
    [
        ([Recording("collective"), Recording("collective", "other")], "the object 'recording'"),
        (["collective", Recording("collective", "collective")], "the object 'collective'"),
    ],
    ids=["two-objects", "a-name-and-an-object-of-that-name"],
)
def test_ranks_that_give_different_transports_are_told_so(on_ranks: RankPools, transports: list[Any], said: str) -> None:
    for text in on_ranks(differing, 2, transports):
        assert text.startswith("transport differs between ranks") and said in text
