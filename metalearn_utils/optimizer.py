"""An update rule, learned or fixed, as a `torch.optim.Optimizer` for a training loop of your own."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .guards import NonFiniteGradient, NonFiniteUpdate, UnreadLoss
from .guards import check_dense, check_finite, check_lr, check_members, finite, one_number
from .rule_files import shapes
from .rules import Params, State, UpdateRule


class LearnedOptimizer(torch.optim.Optimizer):
    """theta_{t+1} = theta_t + u_phi(g_t, s_t) with g_t = p.grad: any `UpdateRule` where `torch.optim.Adam` could stand.

    Each parameter group has its own lr and its own state of the rule, which sees all parameters of the group at once.
    Before each update these slots of the state are filled, if the rule has them: "lr" with the group's lr, "loss", and
    "theta" with the weights. The updates of a rule without a slot "lr" are multiplied by lr, so that the schedulers of
    `torch.optim.lr_scheduler` work with every rule.

    Parameters whose `grad` is None are skipped, as `torch.optim` does: those that have a gradient in the first step of
    their group belong to it from then on, the others stay as they are (one warning names those that require a
    gradient), and a group without any gradient is skipped whole. A parameter that changes sides later is an error.

    `copy.deepcopy` works as for `torch.optim`. Pickling works only if the rule's functions can be pickled; those of
    this library are closures and cannot. Keep `state_dict()` instead, and the rule by `save_rule`.

    Args:
        params: `model.parameters()`, `model.named_parameters()`, or a list of dicts with "params" and perhaps "lr";
            float32 or float64, those of a group on one device.
        rule: the rule, e.g. `load_rule(...)` or `adam(0.001)`; its phi is not changed.
        lr: scale of the updates, >= 0, for groups that do not set it.

    Raises:
        ValueError: no parameters, none that requires a gradient, parameters that are not float32 or float64, names that
            repeat within a group, a bad lr, or not a rule.
    """

    def __init__(self, params: Iterable, rule: UpdateRule, lr: float = 1.0) -> None:
        if not isinstance(rule, UpdateRule):
            raise ValueError(f"rule must be an UpdateRule, e.g. adam(0.001), got {rule!r:.80}")
        params = params if isinstance(params, Tensor) else list(params)
        if len(params) == 0:
            raise ValueError("params is empty: expected parameters, e.g. model.parameters()")
        super().__init__(params, {"lr": check_lr(lr)})
        found = [p for group in self.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in found):
            raise ValueError(f"params must hold a parameter that requires a gradient, got {len(found)} that do not")
        self.rule = rule._replace(phi=pytree.tree_map(lambda v: v.detach().to(found[0].device), rule.phi))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with a fresh state: {"params": ..., "lr": ...}; the errors are those of the constructor."""
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step; no graph is kept. Whatever is refused, neither weights nor state are changed.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the loss.
            loss: the loss at the present weights, one number, for rules that read it, where there is no closure.

        Returns:
            What the closure returned, or `loss`.

        Raises:
            NonFiniteGradient: a gradient holds NaN or infinity.
            NonFiniteUpdate: an update does.
            ValueError: a sparse or half-precision gradient; a parameter that has a gradient in some steps only; a bad
                lr; a loss that is not one finite number, or none for a rule that reads it.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError("step takes a closure or a loss, got both")
            with torch.enable_grad():
                loss = closure()
        value = one_number(loss)
        grads = {i: found for i in range(len(self.param_groups)) if (found := self._gradients(i))}
        moves = {i: self._move(i, found, value) for i, found in grads.items()}
        for i, move in moves.items():
            self._apply(i, *move)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As for `torch.optim`, with the names and shapes of the rule's phi; plain values and tensors only."""
        return super().state_dict() | {"rule": shapes(self.rule.phi)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state of another optimizer, of a rule of another architecture, or of another model.
        """
        expected, found = shapes(self.rule.phi), state_dict.get("rule")
        if found != expected:
            raise ValueError(f"state_dict is of another rule: expected a phi of shapes {expected}, got {found}")
        for i, group in enumerate(state_dict["param_groups"][: len(self.param_groups)]):
            self._check_model(self._named(i, group.get("param_names")), state_dict["state"].get(_key(i)))
        super().load_state_dict(state_dict)
        for i, group in enumerate(self.param_groups):
            if saved := self.state.get(_key(i)):
                self.state[_key(i)] = _moved(saved, group["params"][0].device)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule}

    def _named(self, i: int, names: list[str] | None = None) -> Params:
        """The parameters of a group by name; without names by their number, which counts through all groups."""
        group, start = self.param_groups[i], sum(len(g["params"]) for g in self.param_groups[:i])
        names = names or group.get("param_names") or [str(start + k) for k in range(len(group["params"]))]
        return dict(zip(names, group["params"]))

    def _check_group(self, i: int) -> None:
        group, named = self.param_groups[i], self._named(i)
        check_lr(group["lr"])
        if len(named) < len(group["params"]):
            raise ValueError(f"params must not repeat a name within a group, got {group['param_names']}")
        for name, p in named.items():
            check_dense(f"parameter {name!r}", p)

    def _gradients(self, i: int) -> Params:
        """Checked copies of the gradients of a group; empty if it has none."""
        grads = {name: p.grad for name, p in self._named(i).items() if p.grad is not None}
        if grads and (saved := self.state.get(_key(i))):
            check_members(grads, list(saved["members"]))
        for name, g in grads.items():
            check_dense(f"the gradient of parameter {name!r}", g)
        check_finite(NonFiniteGradient, "the gradient of", grads)
        return _copied(grads)

    def _move(self, i: int, grads: Params, loss: Tensor | None) -> tuple[Params, State]:
        """The updates of a group and the rule's next state."""
        lr, first = check_lr(self.param_groups[i]["lr"]), next(iter(grads.values()))
        state = self._filled(i, grads, loss, lr)
        updates, after = self.rule.update(_moved(self.rule.phi, first.device), grads, state)
        if "lr" not in state:
            updates = {name: lr * u for name, u in updates.items()}
        check_finite(NonFiniteUpdate, "the update of", updates)
        return updates, pytree.tree_map(lambda v: first.new_zeros(()) if isinstance(v, UnreadLoss) else v, after)

    def _filled(self, i: int, grads: Params, loss: Tensor | None, lr: float) -> State:
        """The state of a group, its slots filled."""
        first, saved, named = next(iter(grads.values())), self.state.get(_key(i)), self._named(i)
        theta = None
        if not saved or "theta" in saved["slots"]:
            theta = _copied({name: named[name].detach() for name in grads})
        state = saved["slots"] if saved else self.rule.init(theta)
        value = first.new_zeros(()).as_subclass(UnreadLoss) if loss is None else loss.to(first.device, first.dtype)
        if "loss" in state and loss is not None and not finite(value):
            raise ValueError(f"loss must be finite for a rule that has a slot for it, got {loss.item()}")
        return state | {slot: v for slot, v in {"lr": lr, "loss": value, "theta": theta}.items() if slot in state}

    def _apply(self, i: int, updates: Params, state: State) -> None:
        named = self._named(i)
        skipped = [name for name, p in named.items() if p.requires_grad and name not in updates]
        if skipped and _key(i) not in self.state:
            warnings.warn(f"parameters {skipped} have no gradient in the first step of their group: they are skipped")
        for name, u in updates.items():
            named[name].add_(u.to(named[name].dtype))
        self.state[_key(i)] = {"members": {name: list(named[name].shape) for name in updates}, "slots": state}

    @staticmethod
    def _check_model(named: Params, saved: dict[str, Any] | None) -> None:
        for name, shape in (saved["members"] if saved else {}).items():
            found = list(named[name].shape) if name in named else None
            if found != shape:
                raise ValueError(f"state_dict is of another model: {name!r} had shape {shape} there, {found} here")


def _key(i: int) -> str:
    """Where the state of group i stands: not under a parameter, to whose dtype torch would cast it when loading."""
    return f"group {i}"


def _copied(tensors: Params) -> Params:
    """Copies: the next backward pass writes into p.grad, and the next step into p, which the state must not feel."""
    return {name: v.clone() for name, v in tensors.items()}


def _moved(tree: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, tree)
