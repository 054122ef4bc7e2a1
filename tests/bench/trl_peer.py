"""TRL's side: the GRPOTrainer of the installed TRL in its own, unchanged training loop.

One idea: the loop runs in a thread that stands still between optimizer steps, so it can take turns with us; `update` lets it make
one. Stored rows enter through `rollout_func`, TRL's own door for other samplers; without them it generates with transformers.
Timed inside it: compute_loss and the backward of every accumulation step. Settings are those at which it is fastest for the same
update: no gradient checkpointing, no reference model, no old log-probs (rollouts last one update), no logging, float32.
"""

import collections
import tempfile
import threading
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.case import EOS, PAD, Case
from tests.bench.machine import Clock

LAST_STEP = 10_000  # beyond what anybody waits for; `close` ends the loop


class Peer(TrainerCallback):
    """A GRPOTrainer that makes one update when asked. batch: sequences a forward (per_device_train_batch_size)."""

    def __init__(self, model: Path, shards: pa.Table, case: Case, *, batch: int, generate: bool = False) -> None:
        self.name, self.batch = "TRL", batch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        self.inside = 0.0  # seconds in loss and backward, of the update at hand
        self.lengths: list[int] = []  # of the responses trained on
        self._gradients: dict[str, torch.Tensor] = {}
        self._rows = collections.defaultdict(list)
        for row in shards.to_pylist():
            self._rows[_text(row["prompt_tokens"])].append(row)
        if generate:  # so many tokens end a response that the mean length is the case's
            self.model.generation_config.eos_token_id = list(range(EOS, EOS + _ends(case, self.model.config.vocab_size)))
        self._trainer = self._make(case, len(shards), generate)
        self._go, self._done, self._stop = threading.Semaphore(0), threading.Semaphore(0), False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def update(self) -> float:
        """Seconds of one whole update; `inside` says how many of them were loss and backward."""
        self.inside, self.lengths = 0.0, []
        began = Clock.read()
        self._go.release()
        self._wait()
        return Clock.read() - began

    def gradient(self) -> float:
        """Seconds of loss and backward in one update."""
        self.update()
        return self.inside

    def gradients(self) -> dict[str, torch.Tensor]:
        """The first update's, by parameter, before clipping (which is set so high that it never acts)."""
        return self._gradients

    def close(self) -> None:
        """Ends the loop and its thread."""
        self._stop = True
        self._go.release()
        self._thread.join()

    # ---- callbacks of the loop, in its thread
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:  # everything is set up, and the first batch is not yet made
            self._pause()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause()
        control.should_training_stop = self._stop

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()

    def _wait(self) -> None:
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        torch.set_num_threads(1)  # OpenMP counts a thread's own
        try:
            self._trainer.train()
        except BaseException as failure:
            self._failure = failure
        self._done.release()

    def _make(self, case: Case, rows: int, generate: bool) -> GRPOTrainer:
        peer = self

        class Timed(GRPOTrainer):
            def compute_loss(self, *args: Any, **more: Any) -> torch.Tensor:
                began = Clock.read()
                loss = super().compute_loss(*args, **more)
                peer.inside += Clock.read() - began
                return loss

        def reward(completion_ids: list[list[int]], reward: list[float] | None = None, **_: Any) -> list[float]:
            peer.lengths += map(len, completion_ids)
            return [float(sum(ids) % 2) for ids in completion_ids] if reward is None else reward

        def stored(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
            seen: collections.Counter[str] = collections.Counter()
            chosen = []
            for prompt in prompts:
                chosen.append(self._rows[prompt][seen[prompt] % case.k])
                seen[prompt] += 1
            return {
                "prompt_ids": [row["prompt_tokens"] for row in chosen],
                "completion_ids": [row["tokens"] for row in chosen],
                "logprobs": None,  # the ratio is to the policy's own
                "reward": [row["reward"] for row in chosen],
            }

        self._folder = tempfile.TemporaryDirectory()
        prompts = list(self._rows)
        config = GRPOConfig(
            output_dir=self._folder.name,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=rows // self.batch,
            num_generations=case.k,
            max_completion_length=max(case.lengths),
            temperature=1.0,
            loss_type="grpo",
            scale_rewards="group",
            beta=0.0,
            num_iterations=1,
            learning_rate=0.0,  # the weights stay, so every update is the same work
            weight_decay=0.0,
            max_grad_norm=1e9,
            max_steps=LAST_STEP,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Timed(
            model=self.model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts * 50}),
            processing_class=_tokenizer(self.model.config.vocab_size),
            callbacks=[self],
            rollout_func=None if generate else stored,
        )
        trainer.remove_callback(PrinterCallback)
        backward = trainer.accelerator.backward

        def timed_backward(*args: Any, **more: Any) -> None:
            began = Clock.read()
            backward(*args, **more)
            peer.inside += Clock.read() - began

        trainer.accelerator.backward = timed_backward
        return trainer


def _text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Token i is the word `i`."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token=str(PAD)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(EOS), unk_token=str(PAD))


def _ends(case: Case, vocabulary: int) -> int:
    """How many ids have to end a response so that uniformly random ones, cut at the longest, have the case's mean length."""
    longest, mean = max(case.lengths), sum(case.lengths) / case.k

    def expected(ends: int) -> float:
        q = 1 - ends / vocabulary
        return (1 - q**longest) / (1 - q)

    return min(range(1, vocabulary), key=lambda ends: abs(expected(ends) - mean))
