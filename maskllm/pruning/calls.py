"""How a model calls its blocks: the arguments of each block for each sample, and which blocks hand their output to the next one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from maskllm.errors import MaskLLMError
from maskllm.huggingface.blocks import block_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Blocks = dict[str, torch.nn.Module]


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block's forward pass."""

    hidden: torch.Tensor
    """[batch, sequence, hidden size], or what the model has in its place."""
    args: tuple[Any, ...]
    """The positional arguments after `hidden`."""
    kwargs: dict[str, Any]
    keyword: str | None = None
    """The name of the argument `hidden`; None if it is the first positional one."""

    def output(self, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What `block` makes of `hidden` with the other arguments of this call. Tensors among them may be on another device."""
        args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(hidden.device), (self.args, self.kwargs))
        if self.keyword is not None:
            return _hidden(block(*args, **kwargs, **{self.keyword: hidden}))
        return _hidden(block(hidden, *args, **kwargs))


def _hidden(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states in a block's output: some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _call(args: tuple, kwargs: dict[str, Any]) -> BlockCall:
    if args:
        return BlockCall(args[0], args[1:], kwargs)
    keyword = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    others = {name: value for name, value in kwargs.items() if name != keyword}
    return BlockCall(kwargs[keyword], (), others, keyword)


class _Reached(Exception):  # noqa: N818 - not an error
    """Stops a forward pass at the last call of interest."""


def block_calls(
    model: PreTrainedModel, blocks: Mapping[str, torch.nn.Module], inputs: Mapping[str, Any], *, most: int | None = None
) -> list[tuple[str, BlockCall]]:
    """The calls of `blocks`, with their names, in a forward pass of `inputs` without a cache; it stops before call number `most` runs."""
    calls: list[tuple[str, BlockCall]] = []

    def hook(name: str) -> Callable[..., None]:
        def capture(_block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append((name, _call(args, kwargs)))
            if len(calls) == most:
                raise _Reached

        return capture

    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "use_cache": False}
    handles = [block.register_forward_pre_hook(hook(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        with contextlib.suppress(_Reached):
            model(**_pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(model.device), dict(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass(frozen=True)
class Chain:
    """Blocks that pass hidden states from each to the next, so that the first one's inputs are enough to run them all."""

    blocks: Blocks
    calls: int | None
    """How often a forward pass calls blocks of this chain; None if the sample that was tried calls none."""

    def record(self, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]]) -> Calls:
        """The calls of the chain's blocks for each sample."""
        found = Calls({name: [] for name in self.blocks})
        for sample in samples:
            found.add(block_calls(model, self.blocks, sample, most=self.calls))
        return found


@dataclass
class Calls:
    """The calls of a chain's blocks for all samples, with all tensors on the host. Equal arguments are stored once."""

    arguments: dict[str, list[BlockCall]]
    """By the block's name, one for each sample and call, in the order of `hidden`. Their own hidden states are empty."""
    hidden: list[torch.Tensor] = field(default_factory=list)
    """The first block's inputs."""

    def add(self, calls: Sequence[tuple[str, BlockCall]]) -> None:
        """Add the calls of a sample."""
        first, on_host = next(iter(self.arguments)), {}
        for name, call in calls:
            if name == first:
                self.hidden.append(call.hidden.cpu())
            earlier = self.arguments[name][-1:]
            args, kwargs = _on_host((call.args, call.kwargs), [(other.args, other.kwargs) for other in earlier], on_host)
            self.arguments[name].append(BlockCall(call.hidden.new_empty(0), args, kwargs, call.keyword))

    def forward(self, position: int, block: torch.nn.Module) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """The chain's block at `position` as a function of a sample's number and its hidden states."""
        arguments = list(self.arguments.values())[position]
        return lambda sample, hidden: arguments[sample].output(block, hidden)


def _on_host(tree: Any, earlier: list[Any], seen: dict[int, torch.Tensor]) -> Any:
    """`tree` with its tensors on the host: those of the `earlier` call if they are equal, and one copy of what is in it twice."""
    leaves, spec = _pytree.tree_flatten(tree)
    others, other_spec = _pytree.tree_flatten(earlier[0]) if earlier else ([], None)
    if other_spec != spec:
        others = [None] * len(leaves)
    stored = []
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in seen:
                copy = leaf.cpu()
                same = isinstance(other, torch.Tensor) and other.dtype == copy.dtype and torch.equal(other, copy)
                seen[id(leaf)] = other if same else copy
            leaf = seen[id(leaf)]
        stored.append(leaf)
    return _pytree.tree_unflatten(stored, spec)


def find_chains(model: PreTrainedModel, linears: Mapping[str, torch.nn.Module], sample: Mapping[str, Any]) -> list[Chain]:
    """The blocks that hold `linears`, in the order in which a forward pass of `sample` calls them, cut into chains.

    A chain ends at a block whose output is not the next one's input, as at the end of an encoder, and a block that is called several times
    is one of its own. Blocks that the sample does not reach come last. Raises MaskLLMError if it reaches none.
    """
    blocks = {f"{stack}.{index}": block for stack, each in block_stacks(model).items() for index, block in enumerate(each)}
    blocks = {name: block for name, block in blocks.items() if any(linear.startswith(f"{name}.") for linear in linears)}
    outputs: dict[str, torch.Tensor] = {}
    handles = [block.register_forward_hook(_keep(name, outputs)) for name, block in blocks.items()]
    try:
        calls = block_calls(model, blocks, sample)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise MaskLLMError(f"calibration: the inputs {', '.join(sample)} reach no block of {type(model).__name__}")
    counts: dict[str, int] = {}
    for name, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    chains: list[Blocks] = []
    before = None
    for name, call in calls:
        if counts[name] > 1:
            if not any(name in chain for chain in chains):
                chains.append({name: blocks[name]})
            before = None
        elif before is not None and call.hidden is outputs[before]:
            chains[-1][name] = blocks[name]
            before = name
        else:
            chains.append({name: blocks[name]})
            before = name
    return [Chain(chain, sum(counts[name] for name in chain)) for chain in chains] + [
        Chain({name: block}, None) for name, block in blocks.items() if name not in counts
    ]


def _keep(name: str, outputs: dict[str, torch.Tensor]) -> Callable[..., None]:
    def hook(_block: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs[name] = _hidden(output)

    return hook
