"""Cost of bounding every example's gradient, beside one gradient of the mean and beside Opacus.

    pip install --target DIR --no-deps opacus opt_einsum
    PYTHONPATH=DIR python results/benchmarks/per_example.py [--only NAME] [--examples 50] [--seconds 2]

Contenders, each for the same examples, on one thread of one process: `fedpriv` (`PerExample.clipped_sum`, float64),
`vmap` (every gradient by `torch.func`, then clipped), and Opacus without noise and step: `opacus` (its hooks: every
gradient, then clipped), `opacus-ghost` (norms, then a second backward pass) and `opacus-functorch`. Measurements
alternate with the plain gradient of the mean loss; a ratio is a contender's time on the processor over the mean of the
plain ones before and after it. All clipped sums are compared with one another first. Opacus is left out if it is not
installed. Fills `per-example.csv` and the page.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from page import fill, table
from torch import Tensor, nn
from workloads import median

from fedpriv.bounding import Clip
from fedpriv.tasks.models import Cnn, Mlp, ResNet20
from fedpriv.tasks.per_example import PerExample, cross_entropies
from fedpriv.vectors import Layout, trainable

HERE = Path(__file__).parent
CLIP = 0.5
TOLERANCE = 1e-4
FEW, SLOW = 3, 20.0  # contenders beyond this ratio are measured a few times
WORDS, LENGTH = 2000, 32

Step = Callable[[], Tensor]


class Transformer(nn.Module):
    """A classifier of sentences: two blocks of attention, 64 numbers a word."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.last = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[examples, 10]` of indices `[examples, words]`."""
        x = self.words(inputs) + self.places(torch.arange(LENGTH).repeat(len(inputs), 1))
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


class Block(nn.Module):
    """Attention and two dense layers, each beside a shortcut and behind a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[examples, words, width]`."""
        x = self.before(inputs)
        parts = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key, value = parts
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        inputs = inputs + self.out((weights @ value).transpose(1, 2).flatten(2))
        return inputs + self.down(F.gelu(self.up(self.after(inputs))))


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Models by name, with the shape of an input; a shape of one number means indices of words."""
    torch.manual_seed(0)
    return {
        "mlp 4.8k": (Mlp(hidden=(64,)).build((1, 8, 8), 10, 0), (1, 8, 8)),
        "mlp 1.1M": (Mlp(hidden=(1024, 256)).build((1, 28, 28), 10, 0), (1, 28, 28)),
        "cnn 62k": (Cnn().build((3, 32, 32), 10, 0), (3, 32, 32)),
        "cnn 1M": (Cnn(width=32).build((3, 32, 32), 10, 0), (3, 32, 32)),
        "resnet20": (ResNet20().build((3, 32, 32), 10, 0), (3, 32, 32)),
        "transformer": (Transformer(), (LENGTH,)),
    }


def plain_step(module: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    """Return the gradient of the mean loss."""
    parameters = list(trainable(module).values())

    def step() -> Tensor:
        parts = torch.autograd.grad(F.cross_entropy(module(inputs), labels), parameters)
        return torch.cat([part.reshape(-1) for part in parts])

    return step


def ours(module: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    """`PerExample.clipped_sum`."""
    sums, bound = PerExample(module, Layout.of_module(module), cross_entropies), Clip(clip_norm=CLIP)
    return lambda: sums.clipped_sum(inputs, labels, bound)


def by_vmap(module: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    """Return every gradient by `torch.func`, clipped and added in float32."""
    sums = PerExample(module, Layout.of_module(module), cross_entropies)

    def step() -> Tensor:
        rows = sums.rows(inputs, labels)
        return (CLIP / rows.norm(dim=1)).clamp(max=1.0) @ rows

    return step


def opacus(module: nn.Module, inputs: Tensor, labels: Tensor, *, functorch: bool = False) -> Step:
    """Opacus's hooks: every gradient, then clipped."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(module, loss_reduction="sum", force_functorch=functorch)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": 1, "loss_reduction": "sum"}
    optimizer = DPOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.0), **settings)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(inputs), labels, reduction="sum").backward()
        optimizer.clip_and_accumulate()
        return torch.cat([parameter.summed_grad.reshape(-1) for parameter in optimizer.params])

    return step


def opacus_ghost(module: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    """Opacus's ghost clipping: norms, then a second backward pass."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(module, loss_reduction="sum", max_grad_norm=CLIP)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": 1, "loss_reduction": "sum"}
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(wrapped.parameters(), lr=0.0), **settings)
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss(wrapped(inputs), labels).backward()
        return torch.cat([parameter.grad.reshape(-1) for parameter in optimizer.params])

    return step


CONTENDERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "fedpriv": ours,
    "vmap": by_vmap,
    "opacus": opacus,
    "opacus-ghost": opacus_ghost,
    "opacus-functorch": lambda *given: opacus(*given, functorch=True),
}


def seconds(step: Step) -> float:
    """Time of one call on the processor; waiting for other processes does not count."""
    start = time.thread_time()
    step()
    return time.thread_time() - start


def measure(name: str, examples: int, limit: float) -> Iterator[dict[str, object]]:
    """Yield the rows of one model: milliseconds and ratios."""
    _, shape = models()[name]
    torch.manual_seed(1)
    inputs = torch.randint(WORDS, (examples, *shape)) if len(shape) == 1 else torch.randn(examples, *shape)
    labels = torch.randint(10, (examples,))
    plain = plain_step(models()[name][0], inputs, labels)
    steps = {}
    for contender, make in CONTENDERS.items():
        try:
            steps[contender] = make(models()[name][0], inputs, labels)
        except ImportError as error:
            print(f"  {contender} is absent: {error}", flush=True)
    expected = steps["fedpriv"]()
    for contender, step in steps.items():
        off = float((step() - expected).norm() / expected.norm())
        if off > TOLERANCE:
            raise SystemExit(f"{contender} on {name} is off by {off:.1e}")
    plain()
    times: dict[str, list[float]] = {contender: [] for contender in steps}
    ratios: dict[str, list[float]] = {contender: [] for contender in steps}
    alone, until = [seconds(plain)], time.perf_counter() + limit * len(steps)
    while time.perf_counter() < until or len(ratios["fedpriv"]) < FEW:
        for contender, step in steps.items():
            if len(ratios[contender]) >= FEW and median(ratios[contender]) > SLOW:
                continue
            times[contender].append(seconds(step))
            alone.append(seconds(plain))
            ratios[contender].append(2 * times[contender][-1] / (alone[-1] + alone[-2]))
    size = sum(parameter.numel() for parameter in models()[name][0].parameters())
    yield row(name, size, examples, "plain", alone, [1.0])
    for contender in steps:
        yield row(name, size, examples, contender, times[contender], ratios[contender])


def row(
    model: str, size: int, examples: int, contender: str, times: list[float], ratios: list[float]
) -> dict[str, object]:
    """Return a line of the table."""
    ordered = sorted(ratios)
    quarter, last = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return {
        "model": model,
        "parameters": size,
        "examples": examples,
        "contender": contender,
        "x_plain": f"{median(ratios):.2f}",
        "lower_quartile": f"{quarter:.2f}",
        "upper_quartile": f"{last:.2f}",
        "ms": f"{1e3 * median(times):.3g}",
        "measurements": len(times),
    }


def page(rows: list[dict[str, object]]) -> str:
    """Return the table of the page: ratios by model."""
    cells = {(r["model"], r["examples"], r["contender"]): r for r in rows}
    lines = []
    for model, examples in dict.fromkeys((r["model"], r["examples"]) for r in rows):
        mine = {c: cells.get((model, examples, c)) for c in ("plain", *CONTENDERS)}
        plain = mine.pop("plain")
        assert plain is not None
        found = (f"{r['x_plain']} ({r['lower_quartile']} to {r['upper_quartile']})" if r else "" for r in mine.values())
        lines.append([model, f"{int(str(plain['parameters'])):,}", examples, plain["ms"], *found])
    text = "Times of the plain gradient, one thread; in brackets the quartiles of the measurements.\n\n"
    return text + table(("model", "parameters", "examples", "plain, ms", *CONTENDERS), lines)


def main() -> None:
    """Measure, write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(models()), help="one model")
    parser.add_argument("--examples", action="append", type=int, help="default 50 and 256")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender; default 2")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, object]] = []
    for name in asked.only or models():
        for examples in asked.examples or (50, 256):
            for found in measure(name, examples, asked.seconds):
                print(*found.values(), flush=True)
                rows.append(found)
    if not asked.dry:
        write(rows)


def write(rows: list[dict[str, object]]) -> None:
    """Write the table and the page; models that were not measured now keep their earlier rows."""
    path = HERE / "per-example.csv"
    earlier: list[dict[str, object]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            earlier = [{**found} for found in csv.DictReader(file)]
    measured = {(found["model"], str(found["examples"])) for found in rows}
    rows = [found for found in earlier if (found["model"], found["examples"]) not in measured] + rows
    order = list(models())
    rows.sort(key=lambda found: (order.index(str(found["model"])), int(str(found["examples"]))))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fill("per-example", page(rows))


if __name__ == "__main__":
    main()
