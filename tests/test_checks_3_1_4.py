"""Every check of lab 3.1.4 accepts right answers, and names what is wrong in wrong ones."""

import ast
import json
import math

import torch
from helpers import accepts, refuses
from torch.nn import functional as F

from spark_ft.lab.checks import lab_3_1_4 as checks

# ── Exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────


def label_mask(prompt_ids, completion_ids):
    hidden = [-100] * len(prompt_ids)
    return hidden + list(completion_ids)


def mask_as_tensor(prompt_ids, completion_ids):
    labels = torch.tensor(prompt_ids + completion_ids)
    labels[: len(prompt_ids)] = -100
    return labels


def mask_by_place(prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return [-100 if i < len(prompt_ids) else token for i, token in enumerate(ids)]


def mask_in_a_loop(prompt_ids, completion_ids):
    labels = []
    for _ in prompt_ids:
        labels.append(-100)
    labels.extend(completion_ids)
    return labels


def mask_as_tuple(prompt_ids, completion_ids):
    return (*(-100 for _ in prompt_ids), *completion_ids)


def test_label_mask():
    rights = [label_mask, mask_as_tensor, mask_by_place, mask_in_a_loop, mask_as_tuple]
    accepts(checks.check_label_mask, *rights, times=100)
    refuses(
        checks.check_label_mask,
        ("prompt trains too", lambda p, c: p + c),
        ("go by position", lambda p, c: [-100] * len(p) + [-100 if t == 2 else t for t in c]),
        ("says stop, is masked|go by position", lambda p, c: [-100] * len(p) + c[:-1] + [-100]),
        ("shifted by one", lambda p, c: [-100] * (len(p) - 1) + c + [-100]),
        ("only the completion's labels", lambda p, c: list(c)),
        ("only the prompt's", lambda p, c: [-100] * len(p)),
        ("other way round", lambda p, c: p + [-100] * len(c)),
        ("nothing trains", lambda p, c: [-100] * (len(p) + len(c))),
        ("first token of the completion is masked", lambda p, c: [-100] * (len(p) + 1) + c[1:]),
        ("last token of the prompt trains", lambda p, c: [-100] * (len(p) - 1) + p[-1:] + c),
        ("use −100", lambda p, c: [0] * len(p) + c),
        ("mask is −1", lambda p, c: [-1] * len(p) + c),
        ("without the minus", lambda p, c: [100] * len(p) + c),
        ("completion comes first", lambda p, c: c + [-100] * len(p)),
        ("mask of ones", lambda p, c: [-100] * len(p) + [1] * len(c)),
        ("zeros and ones", lambda p, c: [0] * len(p) + [1] * len(c)),
        ("go by position", lambda p, c: [-100 if t in p else t for t in p + c]),
        ("one whole number", lambda p, c: [None] * len(p) + c),
        ("one whole number", lambda p, c: [float(x) for x in label_mask(p, c)]),
        ("one whole number", lambda p, c: [[-100] * len(p), c]),
        ("returned dict", lambda p, c: {"labels": label_mask(p, c)}),
        ("returned str", lambda p, c: str(label_mask(p, c))),
        ("returned None", lambda p, c: None),
        (r"\d labels .*one for each", lambda p, c: [-100] * len(p) + c + [2]),
        ("changed|had .* items", lambda p, c: (p.extend(c), label_mask(p[: -len(c)], c))[1]),
        ("right is", lambda p, c: [-100] * len(p) + sorted(c)),
        ("TypeError", lambda p, c: -100 * len(p) + c),
        ("NameError", lambda p, c: [-100] * len(prompt) + c),  # noqa: F821
    )


# ── Exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────


def completion_loss(logits, labels):
    scores = logits[:-1]
    targets = labels[1:]
    return F.cross_entropy(scores, targets)


def loss_by_hand(logits, labels):
    logps = logits.log_softmax(-1)
    targets = labels[1:]
    keep = targets != -100
    return -logps[:-1][keep, targets[keep]].mean()


def loss_by_nll(logits, labels):
    return F.nll_loss(F.log_softmax(logits[:-1], dim=-1), labels[1:], ignore_index=-100)


def loss_in_a_loop(logits, labels):
    losses = []
    for t in range(1, len(labels)):
        if labels[t] != -100:
            losses.append(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, labels[t]])
    return sum(losses) / len(losses)


def loss_by_gather(logits, labels):
    targets = labels[1:]
    real = targets >= 0
    picked = logits[:-1].log_softmax(-1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return -(picked * real).sum() / real.sum()


SHIFT = "F.cross_entropy(scores, targets)"


def test_completion_loss():
    rights = [completion_loss, loss_by_hand, loss_by_nll, loss_in_a_loop, loss_by_gather]
    accepts(checks.check_completion_loss, *rights, times=100)
    refuses(
        checks.check_completion_loss,
        ("not shifted", "logits[:-1]", "logits", "labels[1:]", "labels"),
        ("wrong way", "logits[:-1]", "logits[1:]", "labels[1:]", "labels[:-1]"),
        ("shifted by two", "logits[:-1]", "logits[:-2]", "labels[1:]", "labels[2:]"),
        ("same length", "logits[:-1]", "logits"),
        ("same length", "labels[1:]", "labels"),
        ("sum; return the mean", "targets)", 'targets, reduction="sum")'),
        ("masked ones too", "targets)", 'targets, reduction="none").mean()'),
        ("shape", "targets)", 'targets, reduction="none")'),
        ("sign is wrong", SHIFT, f"-{SHIFT}"),
        ("applied twice", "logits[:-1]", "logits[:-1].softmax(-1)"),
        ("no gradient", SHIFT, f"{SHIFT}.detach()"),
        ("no gradient|nothing would train", SHIFT, f"{SHIFT}.item()"),
        ("off by|should be", SHIFT, f"1.1 * {SHIFT}"),
        ("perplexity", SHIFT, f"{SHIFT}.exp()"),
        ("another base", SHIFT, f"{SHIFT} / math.log(2)"),
        ("None|not a tensor", f"return {SHIFT}", SHIFT),
        ("leave it out|IndexError|RuntimeError", SHIFT, "F.nll_loss(scores.log_softmax(-1), targets, "
         "ignore_index=-1)"),
        ("changed in place", "targets = labels[1:]", "labels[labels < 0] = 0; targets = labels[1:]"),
        ("changed in place", "scores = logits[:-1]",
         "logits.data /= 2; scores = logits[:-1]"),
        ("gradients off|nothing would train|no gradient", SHIFT,
         f"torch.set_grad_enabled(False) and {SHIFT} or {SHIFT}"),
        right=completion_loss,
    )  # fmt: skip
    refuses(
        checks.check_completion_loss,
        ("masked ones too", lambda x, y: F.cross_entropy(x[:-1], y[1:], reduction="sum") / len(y)),
        ("mean probability", lambda x, y: torch.exp(-F.cross_entropy(x[:-1], y[1:], reduction="none"))[
            y[1:] >= 0].mean()),
        ("without a softmax", lambda x, y: x[:-1][y[1:] >= 0, y[1:][y[1:] >= 0]].mean()),
        ("without a softmax", lambda x, y: -x[:-1][y[1:] >= 0, y[1:][y[1:] >= 0]].mean()),
        ("no gradient|nothing would train", lambda x, y: torch.tensor(completion_loss(x, y).item())),
    )  # fmt: skip


def test_loss_parity_on_a_real_model(tiny_llama):
    ids = torch.randint(3, 90, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model = tiny_llama()
    accepts(checks.check_loss_parity, (completion_loss, model, batch))
    unshifted = (lambda x, y: F.cross_entropy(x, y), model, batch)
    refuses(checks.check_loss_parity, ("your loss of row 0", unshifted))


# ── Exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────


def accumulated_loss(parts):
    losses = sum(total for total, tokens in parts)
    count = sum(tokens for total, tokens in parts)
    return losses / count


def accumulated_in_a_loop(parts):
    losses, count = 0.0, 0
    for total, tokens in parts:
        losses = losses + total
        count += tokens
    return losses / count


def accumulated_by_weights(parts):
    count = sum(n for _, n in parts)
    return sum((total / n) * (n / count) for total, n in parts if n)


def accumulated_by_stack(parts):
    totals, counts = zip(*parts, strict=True)
    return torch.stack(totals).sum() / torch.tensor(counts).sum()


def test_accumulated_loss():
    rights = [accumulated_loss, accumulated_in_a_loop, accumulated_by_weights, accumulated_by_stack]
    accepts(checks.check_accumulated_loss, *rights, times=100)
    refuses(
        checks.check_accumulated_loss,
        ("mean of means", lambda parts: sum(s / max(n, 1) for s, n in parts) / len(parts)),
        ("no labelled token|mean of means", lambda parts: sum(s / n for s, n in parts) / len(parts)),
        ("sum of means", lambda parts: sum(s / max(n, 1) for s, n in parts)),
        ("divided by the number of parts", lambda parts: sum(s for s, _ in parts) / len(parts)),
        ("that is the sum", lambda parts: sum(s for s, _ in parts)),
        ("last part's tokens", lambda parts: sum(s for s, _ in parts) / max(parts[-1][1], 1)),
        ("first part's tokens", lambda parts: sum(s for s, _ in parts) / max(parts[0][1], 1)),
        ("longest part", lambda parts: sum(s for s, _ in parts) / max(n for _, n in parts)),
        ("first part alone", lambda parts: parts[0][0] / max(parts[0][1], 1)),
        ("last part alone", lambda parts: parts[-1][0] / max(parts[-1][1], 1)),
        ("upside down", lambda parts: sum(n for _, n in parts) / sum(s for s, _ in parts)),
        ("divided twice", lambda parts: accumulated_loss(parts) / len(parts)),
        ("add up all sums", lambda parts: parts[-1][0] / sum(n for _, n in parts)),
        ("number of tokens", lambda parts: float(sum(n for _, n in parts))),
        ("no gradient|nothing would train", lambda parts: accumulated_loss(parts).detach()),
        ("no gradient|nothing would train", lambda parts: sum(s.item() for s, _ in parts) / sum(
            n for _, n in parts)),
        ("gradient", lambda parts: (parts[0][0] + sum(s.detach() for s, _ in parts[1:])) / sum(
            n for _, n in parts)),
        ("None|not a tensor", lambda parts: None),
        ("TypeError", lambda parts: sum(parts) / len(parts)),
        ("got a gradient", lambda parts: (accumulated_loss(parts).backward(), accumulated_loss(parts))[1]),
        ("changed|had .* items", lambda parts: accumulated_loss([parts.pop()])),
    )  # fmt: skip


# ── Exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────


def learning_rate(step, steps, peak, warmup):
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def rate_as_tensor(step, steps, peak, warmup):
    if step < warmup:
        return torch.tensor(peak, dtype=torch.float64) * (step + 1) / warmup
    progress = torch.tensor((step - warmup) / (steps - warmup), dtype=torch.float64)
    return 0.5 * peak * (1.0 + torch.cos(torch.pi * progress))


def rate_by_half_angle(step, steps, peak, warmup):
    rising = (step + 1) / warmup if warmup else 1.0
    falling = math.cos(math.pi / 2 * max(0, step - warmup) / (steps - warmup)) ** 2
    return peak * (min(1.0, rising) if step < warmup else falling)


COSINE = "(1 + math.cos(math.pi * progress)) / 2"


def test_learning_rate():
    accepts(checks.check_learning_rate, learning_rate, rate_as_tensor, rate_by_half_angle, times=100)
    refuses(
        checks.check_learning_rate,
        ("learns nothing", "(step + 1)", "step"),
        ("no warm-up: the first", "peak * (step + 1) / warmup", "peak"),
        ("stays at its peak", COSINE, "1"),
        ("straight line after", COSINE, "(1 - progress)"),
        ("whole cosine", "math.pi * progress", "2 * math.pi * progress"),
        ("π is missing", "math.pi * progress", "progress"),
        ("1 \\+ is missing", COSINE, "math.cos(math.pi * progress)"),
        ("division by 2", ") / 2", ")"),
        ("1 − cos rises", "1 + math.cos", "1 - math.cos"),
        ("quarter", COSINE, "math.cos(math.pi / 2 * progress)"),
        ("counts the warm-up too", "(step - warmup) / (steps - warmup)", "step / steps"),
        ("learns nothing; divide", "(steps - warmup)", "max(1, steps - warmup - 1)"),
        ("divided by steps, not", "/ (steps - warmup)", "/ steps"),
        ("one step too long", "(step + 1) / warmup", "(step + 1) / (warmup + 1)"),
        ("peak is missing in the warm-up", "peak * (step + 1)", "(step + 1)"),
        ("peak is missing after", f"peak * {COSINE}", COSINE),
        ("factor alone", "peak *", "1 *"),
        ("is 0.0005, not 0.00025", "peak * (step + 1) / warmup", "2 * peak * (step + 1) / warmup"),
        ("not .*", "step < warmup", "step <= warmup"),
        ("None|not a tensor", f"return peak * {COSINE}", f"peak * {COSINE}"),
        ("is None", "return peak * (step + 1) / warmup", "return None"),
        ("ask `step < warmup` first", "if step < warmup:", "if step / warmup < 1:"),
        right=learning_rate,
    )
    refuses(
        checks.check_learning_rate,
        ("cosine starts at step 0", lambda step, steps, peak, warmup: (
            peak * (1 + math.cos(math.pi * step / steps)) / 2)),
        ("peak in every step", lambda step, steps, peak, warmup: peak),
        ("not .*", lambda step, steps, peak, warmup: peak * (1 - step / steps)),
        ("shape|one number|\\(20,\\)|\\(80,\\)", lambda step, steps, peak, warmup: [
            learning_rate(i, steps, peak, warmup) for i in range(steps)]),
    )  # fmt: skip


# ── Exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────


def fine_tune(model, batches, loss, steps, rate):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        mean = loss(model, batches(step))
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


def loop_that_clears_first(model, batches, loss, steps, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(0), betas=(0.9, 0.99), weight_decay=0)
    losses = []
    model.train()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        optimizer.param_groups[0]["lr"] = rate(step)
        now = loss(model, batches(step))
        losses.append(float(now))
        now.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
    model.eval()
    return losses


def loop_with_adam(model, batches, loss, steps, rate):
    """Without weight decay AdamW is Adam."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    adam = torch.optim.Adam([parameters[name] for name in names], betas=(0.9, 0.99))
    losses = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        value = loss(model, batches(step))
        gradients = torch.autograd.grad(value, [parameters[name] for name in names])
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, gradient in zip(names, gradients, strict=True):
            parameters[name].grad = gradient * min(1.0, 1.0 / float(norm))
        adam.param_groups[0]["lr"] = rate(step)
        adam.step()
        losses[step] = value.detach()
    return losses


def loop_with_a_scheduler(model, batches, loss, steps, rate):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(min(step, steps - 1)))
    losses = []
    for step in range(steps):
        value = loss(model, batches(step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return losses


SET = 'group["lr"] = rate(step)'
MAKE = "torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)"
CLIP = "torch.nn.utils.clip_grad_norm_(trained, 1.0)"
BACK, STEP, CLEAR = "mean.backward()", "optimizer.step()", "optimizer.zero_grad()"


def test_fine_tune():
    rights = [fine_tune, loop_that_clears_first, loop_with_adam, loop_with_a_scheduler]
    accepts(checks.check_fine_tune, *rights, times=25)
    refuses(
        checks.check_fine_tune,
        ("pile up", CLEAR, "pass"),
        ("between backward", f"{STEP}\n        {CLEAR}", f"{CLEAR}\n        {STEP}"),
        ("between backward", STEP, "pass"),
        ("not clipped", CLIP, "pass"),
        ("not clipped", f"{CLIP}\n        {STEP}", f"{STEP}\n        {CLIP}"),
        ("every gradient is clipped by itself", CLIP, "torch.nn.utils.clip_grad_value_(trained, 1.0)"),
        ("each parameter's norm", CLIP, "[torch.nn.utils.clip_grad_norm_(p, 1.0) for p in trained]"),
        ("rate is never set", SET, "pass"),
        ("rate of step 0 is kept", SET, 'group["lr"] = rate(0)'),
        ("one step ahead", SET, 'group["lr"] = rate(step + 1)'),
        ("decay is 0.01", ", weight_decay=0.0", ""),
        ("betas are", "betas=(0.9, 0.99), ", ""),
        ("its own betas and", ", betas=(0.9, 0.99), weight_decay=0.0", ""),
        ("forgets its moments", f"        {BACK}", f"        optimizer = {MAKE}\n        {BACK}\n"
         f"        for group in optimizer.param_groups: {SET}"),
        ("that is SGD|not right", MAKE, "torch.optim.SGD(trained)"),
        ("takes batch 0", "batches(step)", "batches(0)"),
        ("one ahead", "batches(step)", "batches(step + 1)"),
        ("climbs", BACK, "(-mean).backward()"),
        ("after its step", "mean.item()", "loss(model, batches(step)).item()"),
        ("holds its graph", "mean.item()", "mean"),
        ("returned None", "return losses", "pass"),
        ("one number; return the loss of every", "return losses", "return losses[-1]"),
        ("losses; one for each", "return losses", "return losses[:-1] or [1.0, 1.0]"),
        ("losses; one for each", "range(steps)", "range(steps - 1)"),
        ("losses; one for each|IndexError", "range(steps)", "range(1, steps)"),
        ("returned dict", "return losses", 'return {"losses": losses}'),
        ("frozen weight changed|requires_grad", "if p.requires_grad", "if p.requires_grad_(True) is p"),
        ("UnboundLocalError|NameError", "losses = []", "pass"),
        ("RuntimeError|requires_grad", BACK, "mean.detach().backward()"),
        ("TypeError", SET, 'group["lr"] = rate'),
        ("TypeError", "loss(model, batches(step))", "loss(batches(step), model)"),
        ("not right|weights are not", CLIP, "torch.nn.utils.clip_grad_norm_(trained, 10.0)"),
        ("not right|weights are not", "(0.9, 0.99)", "(0.8, 0.99)"),
        ("AttributeError", "optimizer.zero_grad()", "optimizer.zero_grads()"),
        right=fine_tune,
    )  # fmt: skip


# ── Exercise 6 ──────────────────────────────────────────────────────────────────────────────────────────────


def same_ticket(answer, wanted):
    try:
        given = json.loads(answer)
    except ValueError:
        return False
    return given == json.loads(wanted)


def same_by_spelling(answer, wanted):
    def spelled(text):
        return json.dumps(json.loads(text), sort_keys=True)

    try:
        return spelled(answer) == spelled(wanted)
    except json.JSONDecodeError:
        return False


def same_with_else(answer, wanted):
    try:
        given = json.loads(answer.strip())
    except Exception:
        return False
    else:
        return bool(json.loads(wanted) == given)


def test_same_ticket():
    accepts(checks.check_same_ticket, same_ticket, same_by_spelling, same_with_else, times=100)

    def literal(answer, wanted):
        try:
            return ast.literal_eval(answer) == json.loads(wanted)
        except (ValueError, SyntaxError):
            return False

    def found_inside(answer, wanted):
        start, end = answer.find("{"), answer.rfind("}") + 1
        return same_ticket(answer[start:end], wanted)

    def tables_only(answer, wanted):
        try:
            return json.loads(answer)["table"] == json.loads(wanted)["table"]
        except (ValueError, KeyError, TypeError):
            return False

    def counts_items(answer, wanted):
        try:
            given, right = json.loads(answer), json.loads(wanted)
            return len(given["items"]) == len(right["items"]) and given["table"] == right["table"]
        except (ValueError, KeyError, TypeError):
            return False

    def subset(answer, wanted):
        try:
            given, right = json.loads(answer), json.loads(wanted)
            return all(given[key] == value for key, value in right.items())
        except (ValueError, KeyError, TypeError):
            return False

    refuses(
        checks.check_same_ticket,
        ("compare the contents", lambda a, w: a == w),
        ("compare the contents", lambda a, w: a.strip() == w.strip()),
        ("return False there", lambda a, w: json.loads(a) == json.loads(w)),
        ("returns? True or False|is None", lambda a, w: None),
        ("counts as right", lambda a, w: True),
        ("counts as wrong", lambda a, w: False),
        ("capital letter counts as right", lambda a, w: same_ticket(a.lower(), w.lower())),
        ("words (before|after) the JSON counts|Markdown's fences", found_inside),
        ("Python's quotes", literal),
        ("another number", tables_only),
        ("another number", counts_items),
        ("key too many", subset),
        ("quotes", lambda a, w: same_ticket(a.replace("'", '"'), w)),
        ("return True or False", lambda a, w: "yes" if same_ticket(a, w) else "no"),
        ("return True or False", lambda a, w: int(same_ticket(a, w))),
        ("fences", lambda a, w: same_ticket(a.strip().removeprefix("```json").removesuffix("```"), w)),
        ("AttributeError", lambda a, w: json.load(a) == json.load(w)),
        ("compare the contents", lambda a, w: a.replace(" ", "") == w.replace(" ", "")),
        ("counts as", lambda a, w: sorted(a) == sorted(w)),
    )
