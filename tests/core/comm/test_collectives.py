from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from ranks import run_ranks

from nbaccel.core.comm import collectives as c
from nbaccel.core.world import join, single
from nbaccel.errors import CollectiveMismatch, ConfigError

Pair = namedtuple("Pair", "a b")

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@dataclass(frozen=True)
class Point:
    x: torch.Tensor
    rest: list


def _nested(rank: int, n: int) -> dict:
    t = torch.arange(n, dtype=torch.float32) + 100 * rank
    return {
        "list": [t, (t + 1,)],
        "pair": Pair(t.int(), OrderedDict(k=t.double())),
        "point": Point(t.bool(), [t]),
    }


def _gather_nested(n):
    world = join()
    got = c.gather(_nested(world.rank, n), world=world)
    want = [_nested(r, n) for r in range(world.size)]
    assert isinstance(got["pair"], Pair)
    assert isinstance(got["pair"].b, OrderedDict)
    assert isinstance(got["point"], Point)
    assert torch.equal(got["list"][1][0], torch.cat([w["list"][1][0] for w in want]))
    assert torch.equal(got["pair"].a, torch.cat([w["pair"].a for w in want]))
    assert torch.equal(got["pair"].b["k"], torch.cat([w["pair"].b["k"] for w in want]))
    assert torch.equal(got["point"].x, torch.cat([w["point"].x for w in want]))
    return got["point"].rest[0].tolist()


@pytest.mark.parametrize("n", [3, 500])
def test_gather_when_values_are_nested(n):
    values = run_ranks(_gather_nested, n)
    assert values[0] == values[1] == [*range(n), *(100.0 + i for i in range(n))]


def _move_every_dtype():
    world = join()
    for dtype in DTYPES:
        for n in (5, 4000):
            mine = (torch.arange(n) % 7 + world.rank).to(dtype)
            theirs = [(torch.arange(n) % 7 + r).to(dtype) for r in range(world.size)]
            raw = [t.view(torch.uint8).tolist() for t in theirs]
            got = c.gather(mine, world=world)
            assert got.dtype == dtype
            assert got.view(torch.uint8).tolist() == raw[0] + raw[1], (dtype, n)
            assert c.broadcast(mine, world=world, source=1).view(torch.uint8).tolist() == raw[1]
            assert c.scatter(mine if world.rank == 0 else None, world=world).view(torch.uint8).tolist() == (
                theirs[0].tensor_split(2)[world.rank].view(torch.uint8).tolist()
            )
    return True


def test_every_dtype_when_moved():
    assert run_ranks(_move_every_dtype) == [True, True]


def _reduce_every_dtype():
    world = join()
    for dtype in DTYPES:
        for n in (5, 4000):
            both = [(torch.arange(n) % 3 + r).to(dtype) for r in range(world.size)]
            exact = torch.stack([t.to(torch.complex128 if dtype.is_complex else torch.int64) for t in both])
            own = torch.int64 if dtype == torch.bool else dtype
            mine = both[world.rank]
            total = c.reduce(mine, world=world)
            assert total.dtype == own
            assert torch.equal(total.to(exact.dtype), exact.sum(0)), (dtype, n)
            mean = c.reduce(mine, world=world, reduction="mean")
            assert mean.dtype == (dtype if dtype.is_floating_point or dtype.is_complex else torch.float32)
            assert torch.equal(mean.to(torch.complex128), exact.to(torch.complex128).mean(0)), (dtype, n)
            for extreme in ("max", "min"):
                if dtype.is_complex:
                    with pytest.raises(ConfigError, match=f"rank {world.rank} .* there is no {extreme}"):
                        c.reduce(mine, world=world, reduction=extreme)
                    continue
                got = c.reduce(mine, world=world, reduction=extreme)
                assert got.dtype == own
                assert torch.equal(got.to(torch.int64), getattr(exact, f"a{extreme}")(0)), (dtype, n)
    beyond = torch.tensor([2**63 + 1, 5], dtype=torch.uint64)[world.rank]
    return [c.reduce(beyond, world=world, reduction=r).item() for r in ("sum", "mean", "max", "min")]


def test_every_dtype_when_reduced():
    assert run_ranks(_reduce_every_dtype) == [[2**63 + 6, 2.0**62, 2**63 + 1, 5]] * 2


def _flagged():
    world = join()
    values = []
    for n in (2, 2000):
        numbers = torch.full((n,), 1 + 2j * (world.rank + 1)).conj()
        for lazy in (numbers, numbers.imag):
            gathered = c.gather(lazy, world=world)
            uneven = c.gather_uneven(lazy[: world.rank], world=world)
            swapped = c.all_to_all(lazy, world=world)
            values.append([one[-1].item() for one in (gathered, uneven, swapped)])
            values.append([c.broadcast(lazy[:1], world=world).item(), c.reduce(lazy, world=world)[0].item()])
    return values


def test_collectives_when_numbers_are_lazily_conjugated_or_strided():
    conjugates = [[1 - 4j] * 3, [1 - 2j, 2 - 6j]]
    imaginary = [[-4.0] * 3, [-2.0, -6.0]]
    assert run_ranks(_flagged) == [[*conjugates, *imaginary] * 2] * 2


def _refused():
    world = join()
    words = []
    for call in (
        lambda: c.broadcast(torch.ones(1), world=world, source=9),
        lambda: c.broadcast(torch.ones(9999), world=world, source=-1),
        lambda: c.broadcast_object_list([1], world=world, source=2),
        lambda: c.scatter(torch.ones(2), world=world, source=2),
        lambda: c.scatter({"x": torch.ones(2), "n": 3} if world.rank == 0 else None, world=world),
        lambda: c.gather_object((letter for letter in "ab") if world.rank == 0 else "ab", world=world),
    ):
        try:
            call()
        except (ConfigError, TypeError) as error:
            words.append(str(error))
    # All ranks refuse together: the group is in order.
    assert c.gather(torch.tensor(world.rank), world=world).tolist() == [0, 1]
    return words


def test_collectives_when_refused_all_ranks_refuse():
    for rank, words in enumerate(run_ranks(_refused)):
        operations = ("broadcast", 9), ("broadcast", -1), ("broadcast_object_list", 2), ("scatter", 2)
        assert words[:4] == [
            f"{name} on rank {rank} was asked for from rank {source}; there are ranks 0 to 1"
            for name, source in operations
        ]
        assert "scatter on rank 0" in words[4]
        assert "the value at ['n'] is int" in words[4]
        assert "gather_object on rank 0 got a generator that cannot be pickled" in words[5]


def _odd_shapes():
    world = join()
    scalar = c.gather(torch.tensor(1.5 + world.rank), world=world)
    empty = c.gather(torch.empty(0, 3), world=world)
    strided = c.gather(torch.arange(12).view(3, 4).t()[:, :2], world=world)
    grad = c.gather(torch.ones(2, requires_grad=True), world=world)
    return scalar.tolist(), list(empty.shape), strided.tolist(), grad.requires_grad


def test_gather_when_scalar_empty_or_strided():
    strided = torch.arange(12).view(3, 4).t()[:, :2].tolist()
    assert run_ranks(_odd_shapes) == [([1.5, 2.5], [0, 3], strided * 2, False)] * 2


def test_collectives_when_there_is_one_process():
    world = single()
    t = torch.arange(4.0)
    assert c.gather(torch.tensor(2.0), world=world).tolist() == [2.0]
    assert c.reduce({"a": t}, world=world, reduction="mean")["a"].tolist() == t.tolist()
    assert c.gather_object("x", world=world) == ["x"]
    assert c.all_to_all(t, world=world).tolist() == t.tolist()
    assert c.scatter(t, world=world).tolist() == t.tolist()
    c.barrier(world)
    assert c.reduce(t, world=world, scale=0.5).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert t.tolist() == [0.0, 1.0, 2.0, 3.0]


def _reductions(n):
    world = join()
    mine = torch.full((n,), 1.0 + world.rank)
    out = {}
    for reduction in ("sum", "mean", "max", "min", "none"):
        out[reduction] = c.reduce(mine, world=world, reduction=reduction)[0].item()
    half = torch.full((n,), 2048.0 if world.rank == 0 else 1.0, dtype=torch.float16)
    out["half"] = c.reduce(torch.full((n,), 40000.0, dtype=torch.float16), world=world, reduction="mean")[0]
    out["bf16"] = c.reduce(half.bfloat16(), world=world).dtype
    out["bool"] = c.reduce(torch.ones(n, dtype=torch.bool), world=world)[0]
    out["int mean"] = c.reduce(torch.full((n,), world.rank), world=world, reduction="mean")[0]
    out["complex"] = c.reduce(torch.full((n,), 1j), world=world)[0].item()
    for dtype in (torch.uint16, torch.uint32, torch.complex32):
        one = c.reduce(torch.full((n,), 3.0).to(dtype), world=world)
        out[dtype] = (one.dtype, one[0].item())
    assert mine[0].item() == 1.0 + world.rank, "the caller's tensor was changed"
    return out


@pytest.mark.parametrize("n", [2, 3000])
def test_reduce_when_of_every_kind(n):
    for rank, out in enumerate(run_ranks(_reductions, n)):
        assert (out["sum"], out["mean"], out["max"], out["min"], out["none"]) == (
            3.0,
            1.5,
            2.0,
            1.0,
            1.0 + rank,
        )
        assert out["half"].item() == 40000.0  # 80000 does not fit in float16: the sum was float32
        assert out["half"].dtype == torch.float16
        assert out["bf16"] == torch.bfloat16
        assert (out["bool"].item(), out["bool"].dtype) == (2, torch.int64)
        assert out["int mean"].item() == 0.5
        assert out["complex"] == 2j
        assert all(out[dtype] == (dtype, 6) for dtype in (torch.uint16, torch.uint32, torch.complex32))


def _uneven(n):
    world = join()
    mine = {"x": torch.arange(n + world.rank).float()[:, None], "n": torch.tensor(world.rank)}
    got = c.gather_uneven(mine, world=world)
    return got["x"].flatten().tolist(), got["n"].tolist()


@pytest.mark.parametrize("n", [0, 4, 900])
def test_gather_uneven_when_lengths_differ(n):
    want = ([*map(float, range(n)), *map(float, range(n + 1))], [0, 1])
    assert run_ranks(_uneven, n) == [want, want]


def _objects(size):
    world = join()
    text = "x" * size * (world.rank + 1)
    listed = [world.rank, "old"]
    c.broadcast_object_list(listed, world=world, source=1)
    return [len(o["t"]) for o in c.gather_object({"t": text}, world=world)], listed


@pytest.mark.parametrize("size", [3, 5000])
def test_objects_when_short_and_long(size):
    assert run_ranks(_objects, size) == [([size, 2 * size], [1, "old"])] * 2


def _padding():
    world = join()
    mine = {"a": torch.ones(2 + world.rank, 2), "b": torch.tensor(7)}
    behind = c.pad_across_processes(mine, world=world, pad_index=-1)
    before = c.pad_across_processes(mine["a"], world=world, pad_index=-1, pad_first=True)
    wide = c.pad_across_processes(torch.ones(1, 1 + world.rank), world=world, dim=1)
    return behind["a"][-1].tolist(), behind["b"].item(), before[0].tolist(), wide.tolist()


def test_pad_across_processes_when_lengths_differ():
    rank0, rank1 = run_ranks(_padding)
    assert rank0 == ([-1.0, -1.0], 7, [-1.0, -1.0], [[1.0, 0.0]])
    assert rank1 == ([1.0, 1.0], 7, [1.0, 1.0], [[1.0, 1.0]])


def _exchange_and_scatter():
    world = join()
    sent = torch.arange(8).view(4, 2) + 100 * world.rank
    got = c.all_to_all({"t": sent}, world=world)["t"]
    pieces = c.scatter({"x": torch.arange(5)} if world.rank == 1 else None, world=world, source=1)
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 2"):
        c.all_to_all(torch.ones(3), world=world)
    return got.flatten().tolist(), pieces["x"].tolist()


def test_all_to_all_and_scatter_when_ranks_differ():
    rank0, rank1 = run_ranks(_exchange_and_scatter)
    assert rank0 == ([0, 1, 2, 3, 100, 101, 102, 103], [0, 1, 2])
    assert rank1 == ([4, 5, 6, 7, 104, 105, 106, 107], [3, 4])


def _module():
    world = join()
    torch.manual_seed(world.rank)
    layer = torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        layer.weight.fill_(world.rank + 1.0)
    layer.running_mean.fill_(world.rank + 5.0)
    c.broadcast_module(layer, world=world, source=1)
    return layer.weight.tolist(), layer.running_mean.tolist()


def test_broadcast_module_when_ranks_differ():
    assert run_ranks(_module) == [([2.0] * 3, [6.0] * 3)] * 2


MISMATCHES = {
    "small shape": ["rank 0", "['logits'] float32 [2, 4]", "rank 1", "['logits'] float32 [3, 4]"],
    "large shape": ["['logits'] float32 [200, 4]", "['logits'] float32 [300, 4]", "gather_for_metrics"],
    "small and large": ["float32 [2, 4]", "float32 [300, 4]"],
    "dtype": ["float32 [2000]", "float64 [2000]"],
    "structure": ["['logits']", "['loss']"],
    "operation": ["rank 0: wait_for_everyone", "rank 1: gather", "test_collectives.py"],
    "reduction": ["(sum)", "(mean)"],
    "width": ["[2, 3]", "[2, 4]"],
}


def _mismatches():
    world = join()
    return {case: _mismatch(case, world) for case in MISMATCHES}


def _mismatch(case, world):
    other = world.rank == 1
    try:
        if case == "small shape":
            c.gather({"logits": torch.ones(3 if other else 2, 4)}, world=world)
        elif case == "large shape":
            c.gather({"logits": torch.ones(300 if other else 200, 4)}, world=world)
        elif case == "small and large":
            c.reduce({"logits": torch.ones(300 if other else 2, 4)}, world=world)
        elif case == "dtype":
            c.reduce(
                {"logits": torch.ones(2000, dtype=torch.float64 if other else torch.float32)}, world=world
            )
        elif case == "structure":
            c.gather({"loss" if other else "logits": torch.ones(2)}, world=world)
        elif case == "operation":
            c.gather(torch.ones(2), world=world) if other else c.barrier(world)
        elif case == "reduction":
            c.reduce(torch.ones(2000), world=world, reduction="mean" if other else "sum")
        elif case == "width":
            c.gather_uneven(torch.ones(2, 3 + other), world=world)
    except CollectiveMismatch as error:
        # The group is in order afterwards.
        assert c.gather(torch.tensor(world.rank), world=world).tolist() == [0, 1]
        return str(error)
    return "nothing was noticed"


def test_collectives_when_ranks_disagree():
    rank0, rank1 = run_ranks(_mismatches)
    assert rank0 == rank1
    for case, words in MISMATCHES.items():
        for word in words:
            assert word in rank0[case], case


def _elsewhere(case):
    """A line that has proven itself no longer waits for the frames; then rank 1 is somewhere else."""
    world = join()
    check = c.MismatchCheck("sampled")
    big = torch.ones(200_000)
    try:
        for step in range(8):
            if step == 6 and world.rank == 1:
                if case == "shape":
                    c.gather(torch.ones(300_000), world=world, check=check)
                elif case == "operation":
                    c.reduce(big, world=world, check=check)
                elif case == "small":
                    c.gather(torch.ones(3), world=world, check=check)
                else:
                    c.gather_object("words", world=world)
            c.gather(big, world=world, check=check)
    except CollectiveMismatch as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize("case", ["shape", "operation", "small", "object"])
def test_large_collectives_when_a_rank_is_at_another_line_name_both(case):
    rank0, rank1 = run_ranks(_elsewhere, case)
    assert rank0 == rank1
    assert "rank 0: gather of float32 [200000] at" in rank0
    lines = [int(line.rsplit(":", 1)[1]) for line in rank0.splitlines() if line.startswith("  rank")]
    assert len(set(lines)) == 2
    assert "test_collectives.py" in rank0


def _branches():
    world = join()
    check = c.MismatchCheck("sampled")
    big = torch.ones(1000)
    for _ in range(40):
        got = c.gather(big, world=world, check=check)
        if world.rank == 0:  # noqa: SIM108 - two lines, on purpose
            got = c.gather(got, world=world, check=check)
        else:
            got = c.gather(got, world=world, check=check)
    return got.shape[0], c.reduce(torch.tensor(1), world=world).item()


def test_large_collectives_when_ranks_make_the_same_one_from_different_lines():
    assert run_ranks(_branches) == [(4000, 2)] * 2


def test_check_when_sampled():
    check = c.MismatchCheck("sampled")
    due = [call for call in range(100) if check.due("train.py:1")]
    assert due == [0, 1, 2, 3, 32, 64, 96]
    assert check.due("train.py:2")
    assert not c.MismatchCheck("never").due("x")
    assert all(c.MismatchCheck("always").due("x") for _ in range(9))


def test_gather_when_a_mapping_is_read_only():
    got = c.gather(MappingProxyType({"a": torch.tensor(1.0)}), world=single())
    assert isinstance(got, MappingProxyType)
    assert got["a"].tolist() == [1.0]


def test_gather_when_leaf_is_not_a_tensor():
    with pytest.raises(TypeError, match=r"\['loss'\]\[1\] is float.*gather_object"):
        c.gather({"loss": [torch.ones(1), 2.0]}, world=single())
