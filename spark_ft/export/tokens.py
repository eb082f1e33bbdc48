"""A transformers tokenizer as GGUF fields, which llama.cpp turns into the same tokens."""

import json

from gguf import GGUFWriter, TokenType

_SPLIT = (  # how Qwen2 splits a text before it merges bytes; digits by themselves
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# llama.cpp's name → how the text is split, whether whole words skip the merges, normalizers that may precede
PRE_TOKENIZERS = {
    "gpt-2": (["bytes by words"], False, (None,)),
    "smollm": (["each digit", "bytes by words"], False, (None,)),
    "qwen2": ([_SPLIT, "bytes"], False, (None, "NFC")),  # llama.cpp leaves NFC out: é in two signs stays two
    "llama-bpe": ([_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"), "bytes"], True, (None,)),
}
KNOWN = "those of GPT-2, SmolLM2, Llama 3 and Qwen2 to 3"


def pre_tokenizer(tokenizer) -> str:
    """llama.cpp's name for how a tokenizer splits text.

    Raises:
        ValueError: it is not a byte-level BPE, or splits in a way that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library")
    parts = json.loads(backend.to_str())
    model, normalizer = parts["model"], parts["normalizer"]
    mend = "convert this model with llama.cpp's own convert_hf_to_gguf.py"
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']}{' with byte fallback (SentencePiece)' if model.get('byte_fallback') else ''}"
        raise ValueError(f"the tokenizer is a {kind}; only byte-level BPE is known here. {mend}")
    steps = [_step(step) for step in _steps(parts["pre_tokenizer"])]
    before = normalizer and normalizer["type"]
    for name, (known, ignores_merges, normalizers) in PRE_TOKENIZERS.items():
        if (steps, bool(model.get("ignore_merges"))) == (known, ignores_merges) and before in normalizers:
            return name
    raise ValueError(
        f"the tokenizer splits text in a way that is not known here ({KNOWN} are): {steps}. {mend}"
    )


def _steps(pre: dict | None) -> list[dict]:
    return pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []


def _step(step: dict) -> str:
    plain = not step.get("add_prefix_space") and not step.get("invert")
    if step["type"] == "Digits" and step["individual_digits"]:
        return "each digit"
    if step["type"] == "ByteLevel" and plain:
        return "bytes by words" if step["use_regex"] else "bytes"
    if step["type"] == "Split" and step["behavior"].lower() == "isolated" and plain:
        return step["pattern"].get("Regex", "")
    return json.dumps(step)


def add_tokenizer(writer: GGUFWriter, tokenizer, vocab_size: int, ends: list[int]) -> None:
    """Write a tokenizer's fields: tokens, their kinds, merges, special tokens and the chat template.

    Args:
        vocab_size: rows of the embedding; what the tokenizer does not use of them is marked unused.
        ends: tokens that end an answer, as generation_config has them, beside the tokenizer's own.

    Raises:
        ValueError: see `pre_tokenizer`; or there are more tokens than rows, or no chat template.
    """
    pre, template = pre_tokenizer(tokenizer), tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise ValueError("the tokenizer has no chat template; take an instruct model's, or set one")
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if max(vocab.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(vocab.values()) + 1} tokens, the model {vocab_size} rows")
    tokens = [f"[UNUSED{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for text, i in vocab.items():
        tokens[i], kinds[i] = text, TokenType.NORMAL
        if i in added:
            kinds[i] = TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_add_space_prefix(False)
    ids, bos, eos = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    if eos is not None and ids[-1] == eos:
        writer.add_add_eos_token(True)
    others = [end for end in ends if end != eos]
    for token, add in (
        (bos, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (others[0] if others else None, writer.add_eot_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_chat_template(template)
