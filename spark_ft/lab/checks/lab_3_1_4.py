"""Checks of lab 3.1.4: the label mask, the shifted loss, the mean over micro-batches, the learning rate."""

import math

import torch
from torch.nn import functional as F

from spark_ft.lab.checks import check, require, require_close


@check
def check_label_mask(answer) -> str:
    """label_mask(prompt_ids, completion_ids) → labels, on rows with the stop token inside the prompt too."""
    stop = 2
    for prompt, completion in (([1, 9, 4, 2], [7, 8, stop]), ([5], [stop]), ([2, 2, 3], [6, 2, 6, stop])):
        labels = answer(prompt, completion)
        require(labels is not None, "label_mask returned None; is a return missing?")
        labels = list(labels)
        where = f"for the prompt {prompt} and the completion {completion}"
        n, m = len(prompt), len(completion)
        require(
            len(labels) == n + m,
            f"{len(labels)} labels {where}; there must be one for each of the {n + m} tokens",
        )
        require(labels != prompt + completion, f"the prompt is trained on {where}: its labels must be −100")
        require(
            labels[n:] != [-100 if token == stop else token for token in completion],
            f"the stop token is masked out {where}: the model never learns to stop. Mask by position",
        )
        require(
            labels[n - 1 : -1] != completion,
            f"the labels are shifted by one {where}: the model shifts them itself",
        )
        require(
            labels == [-100] * n + completion,
            f"the labels are {labels} {where}; expected {[-100] * n + completion}",
        )
    return "label_mask trains the whole completion, stop token included, and nothing of the prompt"


@check
def check_completion_loss(answer) -> str:
    """completion_loss(logits (seq, vocab), labels (seq,)) against a loop over the labelled positions."""
    for length, vocab, prompt in ((6, 11, 2), (9, 50, 8), (5, 7, 1)):
        logits = torch.randn(length, vocab)
        labels = torch.randint(vocab, (length,))
        labels[:prompt] = -100
        logps = logits.log_softmax(-1)
        places = [t for t in range(1, length) if labels[t] != -100]
        losses = torch.stack([-logps[t - 1, labels[t]] for t in places])
        unshifted = F.cross_entropy(logits, labels)
        require_close(
            answer(logits, labels),
            losses.mean(),
            f"the loss of {len(places)} labelled tokens out of {length}",
            mistakes={
                "not shifted: row t of the logits predicts token t + 1": unshifted,
                "summed, not averaged": losses.sum(),
                "averaged over every position, the masked ones too": losses.sum() / (length - 1),
                "the sign is wrong: a loss is −log p": -losses.mean(),
            },
        )
    return "completion_loss is the mean of −log p of the labelled tokens, each predicted one position earlier"


@check
def check_loss_parity(answer, model, batch) -> str:
    """completion_loss on a real model's logits, beside spark_ft's loss and transformers' own."""
    from spark_ft.scoring import sft_loss

    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        with torch.no_grad():
            total, count = sft_loss(model, alone)
            theirs = model(**alone)
            yours = answer(theirs.logits[0], alone["labels"][0])
        require_close(total / count, theirs.loss, "spark_ft's loss", tolerance=1e-5)
        require_close(yours, theirs.loss, f"your loss of row {row}, beside transformers' own", tolerance=1e-5)
    losses = f"{yours:.4f}, {total / count:.4f}, {theirs.loss:.4f}"
    return f"yours, spark_ft's and transformers' loss agree on real rows ({losses})"


@check
def check_accumulated_loss(answer) -> str:
    """accumulated_loss([(sum, count), …]) against one big batch."""
    for counts in ((3, 40), (5, 5), (1, 2, 90), (7,)):
        parts = [torch.rand(n) for n in counts]
        means = torch.stack([part.mean() for part in parts])
        got = answer([(part.sum(), len(part)) for part in parts])
        require(got is not None, "accumulated_loss returned None; is a return missing?")
        require_close(
            torch.as_tensor(got),
            torch.cat(parts).mean(),
            f"the loss of micro-batches with {', '.join(map(str, counts))} tokens",
            mistakes={
                "a mean of means: a short micro-batch's tokens weigh more than a long one's": means.mean(),
                "a sum of means: it grows with the number of micro-batches": means.sum(),
                "the sum was divided by the number of micro-batches, not of tokens": (
                    torch.cat(parts).sum() / len(parts)
                ),
            },
        )
    return "accumulated_loss equals one big batch's loss, however the tokens are split"


@check
def check_learning_rate(answer) -> str:
    """learning_rate(step, steps, peak, warmup): a straight rise, then half a cosine to zero."""

    def expected(step, steps, peak, warmup):
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    for steps, peak, warmup in ((80, 2e-3, 8), (20, 1.0, 5), (10, 0.5, 1)):
        got = [answer(step, steps, peak, warmup) for step in range(steps)]
        require(None not in got, "learning_rate returned None; is a return missing?")
        got = [float(rate) for rate in got]
        setting = f"for steps={steps}, peak={peak}, warmup={warmup}"
        require(
            got[0] != 0,
            f"the first step's rate is 0 {setting}, so that step learns nothing; count from step + 1",
        )
        require(
            warmup == 1 or not math.isclose(got[0], peak),
            f"there is no warm-up {setting}: the first step already has the peak rate",
        )
        require(max(got) <= peak * 1.000001, f"the rate rises to {max(got):g} {setting}, above its peak")
        require(
            steps - warmup < 8 or not math.isclose(got[-1], got[warmup], rel_tol=1e-6),
            f"the rate stays at its peak after warm-up {setting}: it should fall along half a cosine",
        )
        for step, rate in enumerate(got):
            right = expected(step, steps, peak, warmup)
            line = peak * (1 - (step - warmup) / (steps - warmup))
            require(
                math.isclose(rate, right, rel_tol=1e-6, abs_tol=1e-12),
                f"step {step} {setting} has the rate {rate:g}, not {right:g}"
                + (
                    "; that is a straight line, not half a cosine"
                    if math.isclose(rate, line, rel_tol=1e-6)
                    else ""
                ),
            )
    return "learning_rate warms up in a straight line and falls along half a cosine"
