"""The fake device computes what the CPU does, counts what it is asked for, and mixes nothing."""

import pytest
import torch
import torch.nn.functional as F

from hf_reasoncache import ReasonAllocCache, SharedBranchCache, SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg
from tests.support.fake_device import DEVICE, Counts, DeviceTensor, MixedDevicesError, fake_device
from tests.support.models import build, prompt


@pytest.fixture
def device():
    with fake_device() as device:
        yield device


def table():
    return torch.arange(6.0).view(2, 3).to(DEVICE)


def place(*numbers):
    return torch.tensor(numbers, device=DEVICE)


def write(x, index, value):
    x[index] = value


OPERATION, WAIT, COPY = Counts(operations=1), Counts(synchronisations=1), Counts(copies=1)
BOTH = Counts(operations=1, synchronisations=1)
KNOWN = {
    # Nothing but launches.
    "add": (lambda x: x + x, OPERATION),
    "add in place": (lambda x: x.add_(1), OPERATION),
    "add a number of the host": (lambda x: x + torch.tensor(2.0), OPERATION),
    "three": (lambda x: (x * 2).softmax(-1).sum(), Counts(operations=3)),
    "product": (lambda x: x @ x.T, OPERATION),
    "made": (lambda x: torch.zeros(3, device=x.device), OPERATION),
    "another type": (lambda x: x.to(torch.float64), OPERATION),
    "contiguous": (lambda x: x.T.contiguous(), OPERATION),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3), OPERATION),
    "attention by name": (
        lambda x: F.scaled_dot_product_attention(query=x[None], key=x[None], value=x[None]),
        OPERATION,
    ),
    "write a number": (lambda x: write(x, 0, 7), OPERATION),
    "write under a mask": (lambda x: write(x, x > 1, 7.0), Counts(operations=2)),
    "move inside": (lambda x: write(x, 0, x[1]), OPERATION),
    "repeat, known length": (
        lambda x: x.repeat_interleave(x[:, 0].long(), dim=0, output_size=3),
        Counts(operations=3),
    ),
    # Nothing at all.
    "views": (lambda x: x.T[None].expand(4, -1, -1)[..., 1:].unbind(0), Counts()),
    "allocations": (lambda x: (torch.empty_like(x), x.new_empty(3)), Counts()),
    "already there": (lambda x: x.to(DEVICE), Counts()),
    "on the host": (lambda x: torch.zeros(3) + 1, Counts()),
    "asked for": (lambda x: (x.shape, x.device, x.dtype, x.stride()), Counts()),
    "made on the host": (lambda x: x.new_zeros(3, device="cpu"), Counts()),
    # Waits.
    "item": (lambda x: x[0, 0].item(), WAIT),
    "float": (lambda x: float(x[0, 0]), WAIT),
    "bool": (lambda x: bool(x[0, 0]), WAIT),
    "if any": (lambda x: bool(x.any()), BOTH),
    "tolist": (lambda x: x.tolist(), WAIT),
    "equal": (lambda x: torch.equal(x, x), BOTH),
    "nonzero": (lambda x: x.nonzero(), BOTH),
    "nonzero as a tuple": (lambda x: x.nonzero(as_tuple=True), BOTH),
    "unique": (lambda x: x.unique(), BOTH),
    "repeat": (lambda x: x.repeat_interleave(x[:, 0].long(), dim=0), Counts(3, 0, 1)),
    "masked_select": (lambda x: x.masked_select(x.bool()), Counts(2, 0, 1)),
    "read under a mask": (lambda x: x[x > 1], Counts(2, 0, 1)),
    "write a tensor under a mask": (lambda x: write(x, x > 1, x[0, 0]), Counts(2, 0, 1)),
    "a number as an index": (lambda x: x[x[0, 0].long()], Counts(1, 0, 1)),
    # Copies.
    "to the device": (lambda x: torch.zeros(3).to(DEVICE), COPY),
    "to the host": (lambda x: x.cpu(), COPY),
    "written from the host": (lambda x: x.copy_(torch.zeros(2, 3)), COPY),
    "written to the host": (lambda x: torch.zeros(2, 3).copy_(x), COPY),
    "a row from the host": (lambda x: write(x, 0, torch.zeros(3)), COPY),
    "a list": (lambda x: torch.tensor([1, 2], device=x.device), COPY),
    "a list as a tensor": (lambda x: torch.as_tensor([1, 2], device=x.device), COPY),
    "an index of the host": (lambda x: x[torch.tensor([1])], Counts(1, 0, 0, 1)),
    "a mask of the host": (lambda x: x[torch.ones(2, 3).bool()], Counts(1, 0, 0, 2)),
    "a number at an index": (lambda x: write(x, place(1), 7.0), Counts(1, 0, 0, 2)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_operations_give_known_counts(name, device):
    act, expected = KNOWN[name]
    x = table()
    with device.counting() as events:
        act(x)
    assert Counts.of(events) == expected, events


MIXED = {
    "add": lambda x: x + torch.zeros(3),
    "add to a number of the host": lambda x: torch.tensor(1.0).add_(x.sum()),
    "write the result elsewhere": lambda x: torch.add(x, x, out=torch.empty(2, 3)),
    "join": lambda x: torch.cat([x, torch.zeros(2, 3)]),
    "stack numbers": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "product": lambda x: x @ torch.zeros(3, 2),
    "where": lambda x: torch.where(torch.ones(2, 3).bool(), x, 0.0),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "the host's at an index": lambda x: torch.zeros(3)[place(1)],
    "a row of the host at an index": lambda x: write(x, place(1), torch.zeros(1, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, torch.zeros(2, 3)),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_places_are_refused(name, device):
    x = table()
    with pytest.raises(MixedDevicesError, match="expected tensors of one device"):
        MIXED[name](x)


def test_an_event_says_what_was_asked_for_and_by_which_line(device):
    x = table()
    with device.counting() as events:
        x.relu().tolist()
        device.note("mark", "here")
    assert [(event.kind, event.name) for event in events] == [
        ("operation", "aten.relu.default"),
        ("synchronisation", "tolist"),
        ("mark", "here"),
    ]
    module, line = events[0].place.split(":")
    assert module == __name__ and events[1].place == f"{module}:{line}"
    assert events[2].place == f"{module}:{int(line) + 1}"


def test_only_what_happens_inside_is_counted(device):
    x = table()
    with device.counting() as events:
        x.add_(1)
    x.add_(1)
    assert len(events) == 1
    with device.counting() as others:
        pass
    assert others == []


def test_one_count_at_a_time(device):
    with (
        device.counting(),
        pytest.raises(RuntimeError, match="one inside another"),
        device.counting(),
    ):
        raise AssertionError("entered")


def test_results_and_writes_are_those_of_the_cpu(device):
    here, there = torch.arange(6.0).view(2, 3), table()
    for x in (here, there):
        row = x[1]
        assert row.mul_(3) is row
        x[:, 0] = 5
        x.T[2].copy_(x[:, 1])
    assert isinstance(there, DeviceTensor) and there.device == DEVICE and not there.is_cpu
    assert torch.equal(there.cpu(), here) and there.tolist() == here.tolist()
    assert there[1].untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
    assert there.T.stride() == here.T.stride() and there[1].storage_offset() == 3


def test_what_it_cannot_do_is_refused(device):
    with pytest.raises(NotImplementedError, match="cannot change a tensor's shape"):
        table().unsqueeze_(0)


def test_its_tensors_are_of_no_use_outside():
    with fake_device():
        x = table()
    stray = torch.zeros(3, device=DEVICE)
    assert not isinstance(stray, DeviceTensor), "left as it was"
    with pytest.raises(RuntimeError, match=r"expected fake_device\(\) around"):
        x + 1
    with fake_device(), pytest.raises(RuntimeError, match=r"expected tensors made inside"):
        x + stray


@pytest.mark.parametrize(
    "make",
    [
        lambda config: ReasonAllocCache(config, budget=None),
        lambda config: ReasonAllocCache(config, budget=24, buffer=2, window=2, risk=0.01),
        lambda config: SlidingWindowCompressCache(config, window=4, ratio=0.5, recent=2),
        SharedBranchCache,
    ],
    ids=["everything", "budget", "windows", "branches"],
)
def test_a_generation_is_that_of_the_cpu(make, device):
    model, inputs = build("llama"), prompt()
    arguments = {"max_new_tokens": 7, "do_sample": False}
    plain = make(model.config)
    expected = model.generate(**inputs, **arguments, **cache_kwarg(plain))
    cache = make(model.to(DEVICE).config)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    with device.counting() as events:
        tokens = model.generate(**inputs, **arguments, **cache_kwarg(cache))
    assert torch.equal(tokens.cpu(), expected)
    there, here = cache.report(), plain.report()
    assert there.total_bytes - there.table_bytes == here.total_bytes - here.table_bytes
    assert there.table_bytes >= here.table_bytes, "some tables are copied to the device"
    reports = [str(report).replace(f"{report.total_bytes:,}", "") for report in (there, here)]
    assert reports[0].replace(f"({DEVICE.type})", "(cpu)") == reports[1]
    assert Counts.of(events).operations > 500
