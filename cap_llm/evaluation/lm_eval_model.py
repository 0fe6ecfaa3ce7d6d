"""lm-eval's model for any number of ranks, on CPUs or GPUs, on one node or several.

lm-eval itself shares requests only among the GPUs of one node. Here each rank is the only one in
lm-eval's eyes: it builds all requests and gets all answers, and the ranks share the work between.
Imported late: lm-eval takes seconds to import.
"""

from __future__ import annotations

import inspect
import logging
import math
import os

import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

FEWSHOT_SEED = 1234  # lm-eval's own default


class SharedLM(HFLM):
    """A causal language model whose answers come from all ranks.

    The batches are those that one rank would make, and a rank takes whole batches: the answers
    are the same to the bit on any number of ranks.

    Attributes:
        title: what the progress bar calls the work at hand.
        truncated: requests so far that were cut at the left to fit the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        world: World,
        console: Console,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.world, self.console = world, console
        self.title, self.truncated = "", 0
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kept = 0  # last positions of a batch whose logits are wanted; 0: all

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, without lm-eval's own progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        A request is its strings, the ids of its context and those of its continuation.

        Raises:
            UserError: a continuation exceeds the model's positions, or the model overflows.
        """
        if override_bs is not None:  # windows of a document that is this rank's alone
            return self._finite(super()._loglikelihood_tokens(requests, True, override_bs))
        # lm-eval computes requests with equal ids, but for the last one, at once
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"{self.title}: an answer has {len(continuation)} tokens, but the model "
                    f"{self.max_length} positions; leave the task out"
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            groups.setdefault((*context, *continuation[:-1]), []).append(i)
        ordered = sorted(groups, key=lambda ids: (-len(ids), ids))  # as lm-eval sorts them
        n = self.batch_size
        batches = [ordered[at : at + n] for at in range(0, len(ordered), n)]
        mine = batches[self.world.rank :: self.world.size]
        answers = {}
        with self.console.bar(self.title, len(mine), "batches") as bar:
            for batch in mine:
                at = [i for ids in batch for i in groups[ids]]
                chosen = [requests[i] for i in at]
                self._kept = self._positions_to_keep(chosen)
                answers |= zip(
                    at, self._finite(super()._loglikelihood_tokens(chosen, True)), strict=True
                )
                self._kept = 0
                bar.advance()
        return self._from_all(answers)

    def _positions_to_keep(self, requests: list[tuple]) -> int:
        """How many last positions of a batch, padded at the right, hold all its continuations."""
        inputs = [min(len(c) + len(t) - 1, self.max_length) for _, c, t in requests]
        longest = max(inputs)
        return max(longest - n + len(t) for n, (_, _, t) in zip(inputs, requests, strict=True))

    def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
        """Logits [B, T', V] of ids [B, T], of the last positions where only those are wanted.

        The head and the softmax over the vocabulary are a good part of the work, and lm-eval
        scores the continuations alone. It counts positions from the end.
        """
        if not (self._can_keep and self._kept):
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=self._kept).logits

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole documents, each cut into windows that go one at a time: a window
        is as long as the model allows."""
        self.batch_size_per_gpu, batch_size = 1, self.batch_size_per_gpu
        answers = {}
        mine = range(self.world.rank, len(requests), self.world.size)
        with self.console.bar(self.title, len(mine), "documents") as bar:
            for i in mine:
                (answers[i],) = super().loglikelihood_rolling([requests[i]], True)
                bar.advance()
        self.batch_size_per_gpu = batch_size
        return self._from_all(answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts; in each batch as many requests as lm-eval puts there."""
        answers = {}
        n = self.batch_size
        batches = [range(len(requests))[at : at + n] for at in range(0, len(requests), n)]
        mine = batches[self.world.rank :: self.world.size]
        with self.console.bar(self.title, len(mine), "batches") as bar:
            for batch in mine:
                part = super().generate_until([requests[i] for i in batch], True)
                answers |= zip(batch, part, strict=True)
                bar.advance()
        return self._from_all(answers)

    def _from_all(self, answers: dict[int, object]) -> list:
        """The answers of all ranks, in the order of the requests."""
        everyone = {}
        for part in self.world.gather(answers):
            everyone |= part
        return [everyone[i] for i in range(len(everyone))]

    def _finite(self, answers: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
        if any(math.isnan(likelihood) for likelihood, _ in answers):
            raise UserError(
                f"{self.title}: a score is not finite: the model overflows; check its weights, or "
                "use one stored in bfloat16 or float32"
            )
        return answers


def evaluate_task(lm: SharedLM, name: str, task, members: list, limit: int | None) -> dict:
    """lm-eval's results for one task or group, as lm-eval's own command computes them.

    Args:
        lm: the model.
        name: the task's.
        task: lm-eval's task or group.
        members: the tasks in it.
        limit: the number of first items to score.

    Raises:
        UserError: memory does not suffice.
    """
    for member in members:
        if member.get_config("num_fewshot") is None:
            member.set_config("num_fewshot", 0)
        member.set_fewshot_seed(FEWSHOT_SEED)
    groups = {g.name: g for g in (task, *task.get_all_groups())} if task not in members else {}
    plan = {"tasks": {m.task_name: m for m in members}, "groups": groups}
    try:
        # Bootstraps, which few metrics need and accuracies do not, on one rank.
        draws = 100 if lm.world.is_main else 0
        found = evaluate(lm, plan, limit=limit, bootstrap_iters=draws, log_samples=False)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{lm.title}: out of memory at batch size {lm.batch_size}; lower evaluate.batch_size"
        ) from None
    return lm.world.gather(found)[0]


def quiet() -> None:
    """lm-eval speaks of every default it takes; only errors pass. And it forks to draw samples."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
