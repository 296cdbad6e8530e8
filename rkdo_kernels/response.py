"""ResponseField: the supervisory field over a dataset, which evolves across optimizer steps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, dense_field, snapshot_field
from .batch import Batch, Exchange, Given, Index, held, index_of, make_batch, ranks_of
from .constants import plain
from .field_state import anywhere
from .initial import Initial
from .losses import REDUCTIONS, Backend, Reduction
from .needs import NEITHER, needed
from .ops import product_dtype, row_dtype
from .turns import Turns, in_turn


class ResponseField:
    """p^(t) over n samples, one row a sample (Martin 2025, eq. 3).

        p^(t) = (1 − α) p^(t−1) + α q^(t−1),  q = softmax(S / τ),  S = queries keysᵀ

    A batch of samples I sees the block P[I, I], with its rows normalised: that is p̂. An update
    distributes a row's mass inside the block anew, and rows keep adding up to one. No gradient
    flows through the field.

        field = ResponseField.dense(n)                          # or .snapshot(n, dim, history=4)
        for images, index in batches:                           # index [B]: which samples they are
            loss = field.step(encode(..), encode(..), index)    # loss, and the field's next state
            loss.backward()

    `step` is `loss` and `update` in one pass. Where a forward pass may run twice or in vain
    (checkpointing, gradient accumulation over the same samples, a scaler that skips steps), call
    `loss`, and `update` after the optimizer's step.

    With a `process_group` rows are held by rank: every rank brings as many samples, none twice, and
    calls the same methods in the same order. A mean or a sum is that of all ranks' samples, and
    DDP's average of the gradients is the gradient of it; "none" gives the losses of a rank's own.

    Threads may share a field: each call sees it as another call has left it. Compiled calls of one
    field are for one thread at a time.
    """

    def __init__(self, state: Any, n: int, group: Any) -> None:
        """Not for users: `dense` and `snapshot` make one."""
        self._state, self._n, self._group = state, n, group

    @classmethod
    @anywhere
    def dense(
        cls,
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        initial: str | Tensor = "identity",
        device: torch.device | str | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> ResponseField:
        """The field as an n × n matrix, in float32, bfloat16 or (PyTorch path) float64; exact.

        `initial` is "identity" (a sample's other view), [n] integer labels (all samples of a row's
        label alike), or [n, n] sparse CSR weights of neighbours (an empty row: identity). `seed` is
        for bfloat16, to which entries are rounded by chance, so that no small change is lost.

        Raises:
            ValueError, TypeError: n < 1; a dtype or an initial that is none of these.
            MemoryError: a matrix that the device cannot have.
        """
        device, group = settle(n, device, process_group)
        checks.integer("seed", seed, at_least=0, below=2**32)
        check_dtype(dtype, dense_field.DTYPES)
        start = Initial(initial, n, device)
        rows = held(n, *ranks_of(group))
        return cls(dense_field.DenseField(n, rows, dtype, start, device, seed), n, group)

    @classmethod
    @anywhere
    def snapshot(
        cls,
        n: int,
        dim: int,
        *,
        history: int,
        dtype: torch.dtype = torch.bfloat16,
        initial: str | Tensor = "identity",
        device: torch.device | str | None = None,
        process_group: Any = None,
    ) -> ResponseField:
        """The field as the embeddings of each sample's last `history` visits, [dim] each.

            p_i = Σ_s α_s Π_{r<s} (1 − α_r) q_i^(s) + Π_s (1 − α_s) p⁰_i   over the visits s

        q^(s) is formed from sample i's query and the other samples' keys s visits ago, over those
        samples of the batch that have as many. That is the dense field, for the first `history`
        updates if every batch is the whole dataset. Other arguments as in `dense`.
        """
        device, group = settle(n, device, process_group)
        checks.integer("dim", dim, at_least=1)
        checks.integer("history", history, at_least=1)
        check_dtype(dtype, snapshot_field.DTYPES)
        start = Initial(initial, n, device)
        rows = held(n, *ranks_of(group))
        state = snapshot_field.SnapshotField(n, rows, dim, history, dtype, start, device, group)
        return cls(state, n, group)

    @in_turn
    def loss(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [B, D]
        index: Index,  # [B] int64 or int32 samples, each once; or a slice of consecutive ones
        *,
        temperature: float | Tensor = 0.5,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> Tensor:  # [] or [B], float32 (float64 for float64 inputs), nats
        """KL(p̂_i ‖ q_i), differentiable in queries and keys; the field stays as it is.

        A row whose mass in the block is below the smallest normal number, 2⁻¹²⁶ (2⁻¹⁰²² of a
        float64 field), has no target: loss and gradient 0, and an update leaves it as it is. With
        reduction "none" the backward pass reads a dense field again, and raises a RuntimeError if
        it has been updated since.

        Raises:
            ValueError: shapes or devices that do not fit, temperature ≤ 0, an unknown reduction or
                backend, an index that repeats a sample or has none of the field's; on a GPU, where
                reading it would wait for the device, and under torch.compile such an index gives a
                NaN loss.
            TypeError: a tensor that is not dense float32, bfloat16, float16 or float64; an index
                that is not int64 or int32.
            RuntimeError: backend="triton" where Triton cannot run.
        """
        checks.choice("reduction", reduction, REDUCTIONS)
        batch = self._batch(queries, keys, index, temperature, backend)
        return self._evaluate(batch, None, reduction)

    @in_turn
    def update(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [B, D]
        index: Index,  # [B]
        *,
        alpha: float = 0.5,
        temperature: float | Tensor = 0.5,
        backend: Backend = "auto",
    ) -> None:
        """P[I, I] ← (1 − α) P[I, I] + α m q,  m_i = Σ_{k in I} P_ik.

        A row whose embedding is not finite stays as it is, in a snapshot also one that its dtype
        does not hold or that has entries past 2³²; so does one whose q is not finite, in a snapshot
        over the finite keys. On an error, so does the field.
        Where a bad index raises nothing it changes nothing.

        Raises:
            ValueError, TypeError, RuntimeError: as `loss`; alpha outside [0, 1]; a call while a
                backward pass runs.
        """
        refuse_in_backward("update")
        alpha_tensor = self._alpha(alpha)
        with torch.no_grad():
            batch = self._batch(queries, keys, index, temperature, backend)
            self._state.evaluate(batch, alpha_tensor, NEITHER)

    @in_turn
    def step(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [B, D]
        index: Index,  # [B]
        *,
        alpha: float = 0.5,
        temperature: float | Tensor = 0.5,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> Tensor:  # [] or [B]
        """`loss`, and `update` with the same q, in one pass: the same bits as the two calls.

        Raises:
            ValueError, TypeError, RuntimeError: as `loss` and `update`.
        """
        refuse_in_backward("step")
        checks.choice("reduction", reduction, REDUCTIONS)
        alpha_tensor = self._alpha(alpha)
        batch = self._batch(queries, keys, index, temperature, backend)
        return self._evaluate(batch, alpha_tensor, reduction)

    @in_turn
    def block(self, index: Index) -> Tensor:  # [B, B]
        """p̂ over a batch: rows of P[I, I], each divided by what it adds up to."""
        batch = self._samples(index)
        return self._of_all(self._state.block(batch), batch)

    @in_turn
    def rows(self, index: Index) -> Tensor:  # [B, n]
        """Rows of a dense field, each divided by its sum.

        Raises:
            RuntimeError: the field is a snapshot, which has no rows but within a batch.
        """
        if self.kind != "dense":
            raise RuntimeError("a snapshot field has no rows of n entries: use block")
        batch = self._samples(index)
        return self._of_all(self._state.rows(batch), batch)

    @property
    def kind(self) -> str:
        """Either "dense" or "snapshot"."""
        return self._state.kind

    @property
    def device(self) -> torch.device:
        return self._tensors["clock"].device

    @property
    def nbytes(self) -> int:
        """Of all of the state's tensors (on this rank)."""
        return sum(x.numel() * x.element_size() for x in self._tensors.values())

    @property
    def updates(self) -> int:
        """How often the field was updated; reads the device."""
        return int(self._tensors["clock"][1])

    @in_turn
    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Everything the field is (on this rank): copies, which a later update leaves alone.

        Without `copy` the field's own tensors, for who saves them at once: no second n × n matrix.
        """
        checks.flag("copy", copy)
        tensors = {name: x.clone() if copy else x for name, x in self._tensors.items()}
        return {"kind": self.kind, "n": self._n, "held": list(self._held), **tensors}

    @in_turn
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned for a field of the same making.

        Raises:
            ValueError: another kind, n, share of the rows, dtype or shape; the field is unchanged.
            TypeError: what is no dict, or has no tensor where the field has one; likewise.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        mine = {"kind": self.kind, "n": self._n, "held": list(self._held)}
        for name, wanted in mine.items():
            if type(state.get(name)) is not type(wanted) or state[name] != wanted:
                raise ValueError(f"state has {name}={state.get(name)!r}, the field {wanted!r}")
        if set(state) != {*mine, *self._tensors}:
            odd = sorted(map(str, set(state) ^ {*mine, *self._tensors}))
            raise ValueError(f"state and field differ in {', '.join(odd)}")
        for name, x in self._tensors.items():
            new = state[name]
            if not isinstance(new, Tensor):
                raise TypeError(f"state has {name} of type {type(new).__name__}, want a tensor")
            if new.shape != x.shape or new.dtype != x.dtype:
                raise ValueError(
                    f"state has {name} {list(new.shape)} {checks.dtype_name(new)}, "
                    f"the field {list(x.shape)} {checks.dtype_name(x)}"
                )
            if new.is_meta or new.layout != torch.strided:
                raise ValueError(f"state has {name} without values of its own, want a dense tensor")
        with torch.no_grad():
            for name, x in self._tensors.items():
                x.copy_(state[name])
        self._state.renewed()

    @in_turn
    @anywhere
    def to(self, device: torch.device | str) -> ResponseField:
        """Moves the state, and returns the field."""
        place = torch.empty(0, device=device).device
        self._state.to(place)
        return self

    @in_turn
    def __getstate__(self) -> dict[str, Any]:
        """For pickles: a state that a later update leaves alone."""
        return {**self.__dict__, "_state": self._copied({})}

    @anywhere
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._state.to(self.device)

    @in_turn
    def __deepcopy__(self, memo: dict[int, Any]) -> ResponseField:
        return ResponseField(self._copied(memo), self._n, self._group)

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        first = next(iter(self._tensors.values()))
        size = f"{self._n}"
        if self.kind == "snapshot":
            size += f", {first.shape[2]}, history={first.shape[0]}"
        return (
            f"ResponseField.{self.kind}({size}, dtype={first.dtype}, device={self.device}): "
            f"{self.nbytes / 1e9:.3g} GB"
        )

    # ---- within ----------------------------------------------------------------------------------

    @anywhere
    def _copied(self, memo: dict[int, Any]) -> Any:
        """The state, of the same ranks."""
        memo[id(self._group)] = self._group
        state = deepcopy(self._state, memo)
        state.to(self.device)
        return state

    @property
    def _turns(self) -> Turns:
        return self._state.turns

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self._state.tensors

    @property
    def _held(self) -> tuple[int, int]:
        return held(self._n, *ranks_of(self._group))

    def _batch(
        self, queries: Tensor, keys: Tensor, index: Index, temperature: Any, backend: str
    ) -> Batch:
        temperature = temperature if torch.compiler.is_compiling() else plain(temperature)
        if backend == "auto" and self._state.dtype == torch.float64:
            backend = "tiled"  # the kernels have no such field
        batch = make_batch(
            queries, keys, index, self._n, self.device, temperature, backend, self._group
        )
        if self.kind == "snapshot" and batch.keys.shape[1] != self._tensors["keys"].shape[2]:
            raise ValueError(
                f"queries {list(queries.shape)} must have the field's dim, "
                f"{self._tensors['keys'].shape[2]}"
            )
        return batch

    def _alpha(self, alpha: float) -> Tensor:  # []
        alpha = alpha if torch.compiler.is_compiling() else plain(alpha)
        checks.number("alpha", alpha, 0, at_most=1)
        dtype = row_dtype(self._tensors["clock"])
        return torch.full((), alpha, dtype=dtype, device=self.device)

    def _evaluate(self, batch: Batch, alpha: Tensor | None, reduction: str) -> Tensor:
        queries, keys = batch.queries, batch.keys
        dtype = product_dtype(keys)
        needs = needed(queries, keys)
        if reduction == "none":
            if any(needs):
                rows = self._state.losses(batch, alpha)
            else:
                rows, *_ = self._state.evaluate(batch, alpha, NEITHER)
            if batch.ranks > 1:
                rows = Exchange.apply(rows, batch.own, keys.shape[0], self._group)
            return rows.to(dtype)
        rows, d_queries, d_keys = self._state.evaluate(batch, alpha, needs)
        total = rows.sum()
        if batch.ranks > 1:
            dist.all_reduce(total, group=self._group)
        share = 1 / keys.shape[0] if reduction == "mean" else 1
        total = total * share
        if any(needs):
            total = Given.apply(queries, keys, total, d_queries, d_keys, share * batch.ranks)
        return total.to(dtype)

    def _samples(self, index: Index) -> Batch:
        """A batch without embeddings."""
        if isinstance(index, slice):
            size = len(range(self._n)[index])
        else:
            size = len(index) if isinstance(index, Tensor) and index.dim() else 1
        index = index_of(index, size, self._n, self.device)
        if not size:
            raise ValueError("index must not be empty")
        nothing = torch.ones(size, 1, device=self.device)
        ranks, rank = ranks_of(self._group)
        batch = make_batch(nothing, nothing, index, self._n, self.device, 1.0, "tiled")
        if ranks == 1:
            return batch
        first, last = self._held
        own = ((batch.index >= first) & (batch.index < last)).nonzero()[:, 0]
        rows = batch.index[own] - first
        return Batch(
            nothing[own], nothing, batch.index, None, rows, own, batch.scale, "tiled", ranks, rank
        )

    def _of_all(self, rows: Tensor, batch: Batch) -> Tensor:
        if batch.ranks == 1:
            return rows
        every = rows.new_zeros(batch.index.shape[0], rows.shape[1]).index_copy_(0, batch.own, rows)
        dist.all_reduce(every, group=self._group)
        return every


def settle(n: int, device: torch.device | str | None, group: Any) -> tuple[torch.device, Any]:
    """The arguments that every field has, checked; a group of one is none."""
    checks.integer("n", n, at_least=1)
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return torch.empty(0, device=device).device, group


def check_dtype(dtype: torch.dtype, wanted: tuple[torch.dtype, ...]) -> None:
    if dtype not in wanted:
        raise ValueError(f"dtype must be one of {', '.join(map(str, wanted))}, got {dtype}")


def refuse_in_backward(name: str) -> None:
    """A function that checkpointing computes anew would update twice."""
    if torch.compiler.is_compiling():
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name} was called while a backward pass runs, as a checkpointed function is: call "
            "loss there, and update after the optimizer's step"
        )
