"""lm-eval's model for any number of ranks, on CPUs or GPUs, on one or several nodes.

lm-eval itself distributes requests only over the GPUs of one node. Here each rank looks to lm-eval
like a single process: it builds all requests and gets all answers, but computes only its share.
Import this module late: importing lm-eval takes seconds.
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


class DistributedHFLM(HFLM):
    """A causal language model that distributes requests over all ranks.

    Ranks take whole batches of those that a single rank would form, so the answers are
    bit-identical on any number of ranks.

    Attributes:
        title: the title of the progress bar.
        truncated: number of requests so far that were cut on the left to fit the model's positions.
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
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._logits_to_keep = 0  # the last positions of a batch that need logits; 0: all

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, without lm-eval's own progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        A request holds its strings, the ids of its context and those of its continuation.

        Raises:
            UserError: a continuation exceeds the model's positions, or the model overflows.
        """
        if override_bs is not None:  # windows of one document, which only this rank scores
            return self._finite(super()._loglikelihood_tokens(requests, True, override_bs))
        # lm-eval computes requests that differ at most in their last id together
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"{self.title}: an answer has {len(continuation)} tokens, but the model has "
                    f"only {self.max_length} positions. Leave the task out."
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            groups.setdefault((*context, *continuation[:-1]), []).append(i)
        ordered = sorted(groups, key=lambda ids: (-len(ids), ids))  # as lm-eval sorts them
        n = self.batch_size
        batches = [ordered[at : at + n] for at in range(0, len(ordered), n)]
        shard = batches[self.world.rank :: self.world.size]
        answers = {}
        with self.console.bar(self.title, len(shard), "batches") as bar:
            for batch in shard:
                numbers = [i for ids in batch for i in groups[ids]]
                part = [requests[i] for i in numbers]
                self._logits_to_keep = self._positions_to_keep(part)
                likelihoods = self._finite(super()._loglikelihood_tokens(part, True))
                answers |= zip(numbers, likelihoods, strict=True)
                self._logits_to_keep = 0
                bar.advance()
        return self._gather(answers)

    def _positions_to_keep(self, requests: list[tuple]) -> int:
        """The number of last positions of a right-padded batch that cover all continuations."""
        inputs = [min(len(c) + len(t) - 1, self.max_length) for _, c, t in requests]
        longest = max(inputs)
        return max(longest - n + len(t) for n, (_, _, t) in zip(inputs, requests, strict=True))

    def _model_call(self, inps: torch.Tensor, attn_mask=None, labels=None) -> torch.Tensor:
        """Logits [B, T', V] of ids [B, T], if possible only of the last T' positions needed.

        This saves much of the head and of the softmax over the vocabulary. lm-eval scores only the
        continuations, whose positions it counts from the end.
        """
        if not (self._has_logits_to_keep and self._logits_to_keep):
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=self._logits_to_keep).logits

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole documents, in windows of full length, one at a time."""
        self.batch_size_per_gpu, batch_size = 1, self.batch_size_per_gpu
        answers = {}
        shard = range(self.world.rank, len(requests), self.world.size)
        with self.console.bar(self.title, len(shard), "documents") as bar:
            for i in shard:
                (answers[i],) = super().loglikelihood_rolling([requests[i]], True)
                bar.advance()
        self.batch_size_per_gpu = batch_size
        return self._gather(answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, in the batches that lm-eval would form."""
        answers = {}
        n = self.batch_size
        batches = [range(len(requests))[at : at + n] for at in range(0, len(requests), n)]
        shard = batches[self.world.rank :: self.world.size]
        with self.console.bar(self.title, len(shard), "batches") as bar:
            for batch in shard:
                part = super().generate_until([requests[i] for i in batch], True)
                answers |= zip(batch, part, strict=True)
                bar.advance()
        return self._gather(answers)

    def _gather(self, answers: dict[int, object]) -> list:
        """The answers of all ranks, in the order of the requests."""
        by_number = {i: answer for part in self.world.gather(answers) for i, answer in part.items()}
        return [by_number[i] for i in range(len(by_number))]

    def _finite(self, answers: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
        if any(math.isnan(likelihood) for likelihood, _ in answers):
            raise UserError(
                f"{self.title}: a score is NaN because the model overflows. Check its weights, or "
                "use a model stored in bfloat16 or float32."
            )
        return answers


def evaluate_task(lm: DistributedHFLM, task, members: list, limit: int | None) -> dict:
    """lm-eval's results for one task or group, the same as from lm-eval's own command.

    Args:
        lm: the model.
        task: lm-eval's task or group.
        members: the tasks in it.
        limit: the number of first items to score.

    Raises:
        UserError: the batch does not fit in memory.
    """
    for member in members:
        if member.get_config("num_fewshot") is None:
            member.set_config("num_fewshot", 0)
        member.set_fewshot_seed(FEWSHOT_SEED)
    groups = {g.name: g for g in (task, *task.get_all_groups())} if task not in members else {}
    plan = {"tasks": {m.task_name: m for m in members}, "groups": groups}
    try:
        # Only rank 0 bootstraps; few metrics need it, and accuracies do not.
        n_bootstrap = 100 if lm.world.is_main else 0
        results = evaluate(lm, plan, limit=limit, bootstrap_iters=n_bootstrap, log_samples=False)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{lm.title}: out of memory at batch size {lm.batch_size}. Lower --evaluate.batch_size."
        ) from None
    return lm.world.gather(results)[0]


def quiet() -> None:
    """Limits lm-eval's log to errors and keeps it from forking processes for the bootstrap."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
