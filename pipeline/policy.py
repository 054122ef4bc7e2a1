"""The policy's folder seen from outside: its content id, and its tokenizer. No torch here.

One idea: a policy is what its files say. `policy_id` hashes everything that decides which text it writes (weights,
config, tokenizer, chat template) and nothing else, so a checkpoint with other trainer state is the same policy.
`Renderer` is the only place where text becomes token ids: prompts for the engines, teacher traces for grade, and back.
It leaves out the model itself: engines and the trainer load that.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.ids import digest
from schemas.templates import CHAT, PROBLEM, TEXTS, THINK

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
)
CONTENT = ("*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Messages = Sequence[Mapping[str, str]]


def policy_id(folder: Path) -> str:
    """sha256 over the sorted (name, sha256) of the files that decide what this policy writes.

    Only the folder itself counts, so `trainer/` never does; `generation_config.json` does not either.
    """
    check_folder(folder)
    return _content_id(folder, CONTENT)


def tokenizer_id(folder: Path) -> str:
    """The same of its tokenizer and chat template alone: two folders with one id render every prompt alike."""
    return _content_id(folder, TOKENIZER)


def _content_id(folder: Path, patterns: tuple[str, ...]) -> str:
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return digest(sorted([path.name, _sha256(path)] for path in files))


def check_folder(folder: Path, key: str = "policy.model") -> None:
    """UserError unless this is a Hugging Face folder with safetensors weights."""
    wanted = "expected a Hugging Face model folder with config.json, tokenizer files and *.safetensors"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: {wanted}, found no such folder. Give {key} a folder on disk; models are never downloaded by dypo"
        )
    found = sorted(path.name for path in folder.iterdir())
    if "config.json" not in found:
        names = ", ".join(found[:8]) or "nothing"
        raise UserError(f"{folder}: {wanted}, found no config.json (there is: {names}). Is it the right folder?")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder}: {wanted}, found pickled weights ({', '.join(pickled[:4])}), which are never loaded since a "
                "pickle can run code. Convert them once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise UserError(f"{folder}: {wanted}, found no *.safetensors. Was the download or the save complete?")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocabulary(folder: Path) -> dict[str, int]:
    """The ids of a policy's tokens, by text."""
    return Renderer(folder).vocabulary


class Renderer:
    """The policy's tokenizer, and its chat template or the one that the recipe gives (policy.template)."""

    def __init__(self, folder: Path, template: str = "chat") -> None:
        from transformers import AutoTokenizer

        self.folder, self.template = folder, template
        if not folder.is_dir():
            check_folder(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())
            raise UserError(
                f"{folder}: expected tokenizer files (tokenizer.json, tokenizer_config.json), found none that "
                f"transformers can load: {reason}. Save the policy's tokenizer into this folder"
            ) from None
        if template in CHAT and not self._tokenizer.chat_template:
            raise UserError(
                f"{folder}: expected a chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
                "found none. A base model needs one to render prompts; a file with one line is enough, for example "
                "{% for m in messages %}{{ m.content }}\n{% endfor %}. Or give policy.template a text with {problem} in it"
            )
        self.eos_ids: tuple[int, ...] = self._read_eos()
        own = self._tokenizer.eos_token_id
        self._eos: int = own if own in self.eos_ids else self.eos_ids[0]
        self._eos_text: str = self._tokenizer.decode([self._eos], skip_special_tokens=False)
        self._rendered = lru_cache(maxsize=65536)(self._render)

    @property
    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def prompt_tokens(self, messages: Messages) -> list[int]:
        """The ids that a response to `messages` continues."""
        return list(self._rendered(_frozen(messages))[1])

    def prompt_text(self, messages: Messages) -> str:
        """The rendered prompt that `prompt_tokens` are the ids of."""
        return self._rendered(_frozen(messages))[0]

    def trace_tokens(self, prompt: Sequence[int] | str, text: str) -> list[int]:
        """A teacher's text as a target after `prompt` (its ids, or rendered): its ids, then end-of-sequence, once.

        A template that opens the thinking itself leaves its tag out of the target, as it is in the prompt already.
        """
        tail = prompt if isinstance(prompt, str) else self._tokenizer.decode(list(prompt[-8:]), skip_special_tokens=False)
        if tail.endswith(THINK):
            text = text.removeprefix(THINK)
        text = text.removesuffix(self._eos_text)
        return [*self._ids(text), self._eos]

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of a response, special tokens left out unless `special`."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _render(self, messages: tuple[tuple[str, str], ...]) -> tuple[str, tuple[int, ...]]:
        rendered = self._chat(messages) if self.template in CHAT else self._plain(messages)
        if self.template == "chat_think" and not rendered.endswith(THINK):
            rendered += THINK
        return rendered, tuple(self._ids(rendered))

    def _plain(self, messages: tuple[tuple[str, str], ...]) -> str:
        """A problem in a template without roles: the system message, if any, stands before it."""
        *before, (_, problem) = messages
        if any(role != "system" for role, _ in before):
            raise UserError(
                f"{self.folder}: policy.template = '{self.template[:40]}' renders one problem, found a chat with the roles "
                f"{', '.join(role for role, _ in messages)}. Use template = 'chat', or leave such prompts out"
            )
        opens = self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        start = self._tokenizer.bos_token if opens else ""
        body = TEXTS.get(self.template, self.template).replace(PROBLEM, problem)
        return start + "".join(f"{content}\n\n" for _, content in before) + body

    def _chat(self, messages: tuple[tuple[str, str], ...]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as e:
            raise UserError(
                f"{self.folder}: its chat template cannot render a chat with the roles "
                f"{', '.join(role for role, _ in messages)}: {e}. Mend the template, or the messages"
            ) from None

    def _ids(self, text: str) -> list[int]:
        try:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as e:  # the tokenizers library raises nothing narrower
            raise UserError(f"{self.folder}: its tokenizer cannot encode {text[:80]!r}: {e}. Leave this text out") from None

    def _read_eos(self) -> tuple[int, ...]:
        """What ends a response: generation_config.json's ids, else the tokenizer's own."""
        path = self.folder / "generation_config.json"
        ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ids is None:
            ids = self._tokenizer.eos_token_id
        if ids is None:
            raise UserError(
                f"{self.folder}: expected an end-of-sequence token (eos_token in tokenizer_config.json or eos_token_id "
                "in generation_config.json), found none. Without one no response could ever stop"
            )
        return tuple(ids) if isinstance(ids, list) else (ids,)


def _frozen(messages: Messages) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in messages)
