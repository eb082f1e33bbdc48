"""Your code trains: what the learner wrote in a real run, its curve over the package's."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from spark_ft.lab import plots
from spark_ft.lab.checks import is_stub, told
from spark_ft.lab.checks.kept import Kept, modules_near
from spark_ft.training import History

Run = Callable[[], History | Sequence[float]]


class _NoLosses(TypeError):
    """A run that returned something else."""


def trains(
    yours: Run,
    package: Run,
    *,
    what: str,
    y: str,
    caption: str,
    within: float = 0.02,
    x: str = "step",
    does: str = "trains",
) -> None:
    """Run the package's code, then the learner's, and draw both curves with a sentence that says how near.

    Both runs start from the same random state. If the learner's code is not written yet, raises, or ends in
    nan, the curve is the package's alone and the sentence says why; the lab goes on in every case.

    Args:
        yours: makes one short run with the learner's code and returns its `History`, or its losses.
        package: the same run with the package's code.
        what: what the learner wrote, in one word: "loss", "layer", "loop".
        y: the curve's name and unit: "DPO loss (nats per pair)".
        caption: what the curves rest on: model, data, steps, seed.
        within: largest difference that counts as the same curve, as a share of the package's largest loss.
        x, does: what the curve runs over and what the code does, if it is no training: "token", "serves".
    """
    reference = _losses(package)
    kept = Kept(modules_near([yours]))
    mine: list[float] | None = None
    try:
        with warnings.catch_warnings():  # what a plan stumbles over, the step itself does too: told below
            warnings.filterwarnings("ignore", message="this step can't be planned")
            mine = _losses(yours)
        said, title = _compared(mine, reference, what, within, x, does)
    except NotImplementedError as error:
        if is_stub(error):
            said = f"not written yet – {str(error).removeprefix('your turn').strip(' ()') or f'your {what}'}"
            title = f"spark_ft's {what} {does}; yours is not written yet"
        else:
            said, title = _broken(error, yours, f"{what} {does}", what)
    except Exception as error:
        said, title = _broken(error, yours, f"{what} {does}", what)
    finally:
        kept.restore()
    print(said if mine else f"{said}; the lab goes on with spark_ft's")
    _draw(mine, reference, title, x, y, caption)


def _losses(run: Run) -> list[float]:
    with torch.random.fork_rng():
        result = run()
    losses = getattr(result, "losses", result)
    if not isinstance(losses, Sequence) or not losses:
        raise _NoLosses(
            f"the run returned {type(result).__name__} and no losses; return what `train` returns"
        )
    return [float(loss) for loss in losses]


def _broken(error: Exception, yours: Run, works: str, what: str) -> tuple[str, str]:
    if isinstance(error, FloatingPointError):
        return f"✗ your {what} ends in nan or inf: {error}", f"spark_ft's {works}; yours ends in nan"
    if isinstance(error, _NoLosses):
        return f"✗ {error}", f"spark_ft's {works}; yours gave no losses"
    return f"✗ {told.exception(error, [yours])}", f"spark_ft's {works}; yours stopped with an error"


def _compared(
    mine: list[float], reference: list[float], what: str, within: float, x: str, does: str
) -> tuple[str, str]:
    """The sentence and the figure's title for two finished runs."""
    if not all(math.isfinite(loss) for loss in mine):
        raise FloatingPointError(f"step {[math.isfinite(loss) for loss in mine].index(False) + 1}")
    scale = max(abs(loss) for loss in reference)
    gaps = [abs(a - b) / scale for a, b in zip(mine, reference, strict=False)]
    apart = f"its curve is not spark_ft's: your {what} {does} something else"
    if len(mine) != len(reference):
        return f"✗ yours took {len(mine)} {x}s, spark_ft's {len(reference)}", apart.capitalize()
    if max(gaps) <= within:
        said = f"✓ your {what} {does}: {len(mine)} {x}s, at most {max(gaps):.1%} from spark_ft's"
        return said, f"Your {what} {does}, and its curve lies on spark_ft's"
    step = next(i for i, gap in enumerate(gaps) if gap > within)
    numbers = f"at {x} {step + 1} yours is {mine[step]:.4g}, spark_ft's {reference[step]:.4g}"
    if does == "trains" and mine[-1] > 1.5 * max(mine[0], reference[-1]):
        ends = f"its loss goes from {mine[0]:.4g} to {mine[-1]:.4g}, spark_ft's to {reference[-1]:.4g}"
        return f"✗ your {what} diverges: {ends}", f"With your {what} the loss rises"
    return f"✗ {apart}; {numbers}", apart.capitalize()


def _draw(mine: list[float] | None, reference: list[float], title: str, x: str, y: str, caption: str) -> None:
    fig, ax = plots.figure(title, x=x, y=y, caption=caption, height=3.0)
    steps = range(1, len(reference) + 1)
    ax.plot(steps, reference, **{**plots.LINE["package"], "linewidth": 3, "marker": ""}, label="spark_ft")
    ends = f"{reference[0]:.3g} to {reference[-1]:.3g} in {len(reference)} {x}s"
    alt = f"{title}. spark_ft's loss goes from {ends}"
    if mine:
        ax.plot(range(1, len(mine) + 1), mine, **{**plots.LINE["yours"], "linestyle": ""}, label="yours")
        alt += f", yours from {mine[0]:.3g} to {mine[-1]:.3g}"
    ax.legend()
    plots.show(fig, alt=f"{alt}.")
