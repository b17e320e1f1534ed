"""`Architect`: the gradients with respect to α, and the gradient of Λ with respect to the weights."""
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .alignment import layer_alignment
from .errors import InputError
from .model_search import SearchNetwork, frozen_statistics
from .operations import NoiseOp

Batch = tuple[Tensor, Tensor]  # x [N, 3, H, W], y [N]
METHODS = ("central", "forward", "exact")


class WeightGrads(NamedTuple):
    loss: Tensor
    logits: Tensor  # [N, num_classes], of the training pass
    dw: Sequence[Tensor]  # ∇_w L
    d_lambda: Sequence[Tensor] | None  # ∇_w Λ
    alignment: Tensor | None  # Λ
    norms: Tensor | None = None  # [3], of a search step: ‖λ_t ∇_w Λ‖, ‖∇_w L‖, and 1 where their sum was clipped


class Architect:
    """Computes gradients, and steps α with Adam.

    net: the supernet; criterion: (logits, y) -> scalar loss; lr, betas, weight_decay: of Adam on α; w_momentum,
    w_weight_decay: those of the SGD on w, which the unrolled step imitates. No method here changes a weight, a buffer
    or a momentum, except that lambda_grads moves the batch-norm statistics once, as the training pass that it is.
    """

    def __init__(self, net: SearchNetwork, criterion: Callable[[Tensor, Tensor], Tensor], lr: float = 3e-4,
                 betas: tuple[float, float] = (0.5, 0.999), weight_decay: float = 1e-3,
                 w_momentum: float = 0.9, w_weight_decay: float = 3e-4):
        self.net, self.criterion = net, criterion
        self.w_momentum, self.w_weight_decay = w_momentum, w_weight_decay
        self.optimizer = torch.optim.Adam(net.arch_parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        alphas = {id(alpha) for alpha in net.arch_parameters()}
        self._names = [name for name, p in net.named_parameters() if id(p) not in alphas]
        self._noisy = any(isinstance(m, NoiseOp) for m in net.modules())

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of Adam along the gradients of alpha_grads."""
        for alpha, grad in zip(self.net.arch_parameters(), grads):
            alpha.grad = grad
        self.optimizer.step()

    def alpha_grads(self, train: Batch, valid: Batch, eta: float, w_optimizer: torch.optim.Optimizer | None,
                    unrolled: bool, hessian: str = "central") -> list[Tensor]:
        """∂L_valid/∂α, at w or, `unrolled`, at w' = w − ξ (∇L_train + momentum · v + weight_decay · w).

        eta: ξ, the current learning rate; w_optimizer: the SGD whose momentum buffers are v (0 where it has none yet);
        hessian: ∂²L_train/∂α∂w · ∇_w' L_valid by a `central` difference of radius 1e-2 / ‖∇_w' L_valid‖, as
        published, or `exact` by double backward. Liu et al., 2019, eq. 6 to 8. train is read only if `unrolled`.
        """
        if hessian not in ("central", "exact"):
            raise InputError(f"unknown way {hessian!r} to the product with the Hessian: use central or exact")
        alphas = self.net.arch_parameters()
        with frozen_statistics(self.net):
            if not unrolled:
                return list(torch.autograd.grad(self._loss(valid), alphas))
            w = self.net.weight_parameters()
            rng = self._rng(train[0].device)
            loss = self._loss(train)
            dw = torch.autograd.grad(loss, w, create_graph=hessian == "exact")
            with torch.no_grad():
                unrolled_w = [p - eta * (g + self.w_momentum * v + self.w_weight_decay * p)
                              for p, g, v in zip(w, dw, self._momenta(w, w_optimizer))]
            unrolled_w = [p.requires_grad_() for p in unrolled_w]
            grads = torch.autograd.grad(self._loss(valid, weights=unrolled_w), [*alphas, *unrolled_w])
            d_alpha, vector = grads[: len(alphas)], grads[len(alphas) :]  # ∂L_valid(w', α), by α and by w'
            if hessian == "exact":
                product = torch.autograd.grad(dw, alphas, vector)
            else:
                r = 1e-2 / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))
                up, down = (
                    torch.autograd.grad(
                        self._loss(train, weights=[p.detach() + s * r * v for p, v in zip(w, vector)], rng=rng), alphas)
                    for s in (1, -1))
                product = [(a - b) / (2 * r) for a, b in zip(up, down)]
        return [d - eta * h for d, h in zip(d_alpha, product)]

    def lambda_grads(self, batch: Batch, kind: str = "cosine", epsilon: float = 1e-4,
                     method: str = "central") -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """(L, ∇_w L, ∇_w Λ, Λ) on one training batch; gradients in the order of net.weight_parameters().

        kind: `cosine` or `sign`, see layer_alignment. With g_l = ∂L/∂p_l and u_l = ∂Λ/∂g_l over the normal cells,
        ∇_w Λ = Σ_l ∂²L/∂w∂p_l · u_l, by the method `central`, a difference of ∇_w L at p ± ε u with ε = epsilon / ‖u‖,
        as published (Movahedi et al., 2023, section 4); `forward`, between p + ε u and p; or `exact`, by double
        backward.
        """
        if method not in METHODS:
            raise InputError(f"unknown method {method!r} for the gradient of Λ: use one of {', '.join(METHODS)}")
        grads = self.weight_grads(batch, kind, epsilon, method)
        return grads.loss, grads.dw, grads.d_lambda, grads.alignment

    def weight_grads(self, batch: Batch, kind: str, epsilon: float, method: str | None) -> "WeightGrads":
        """lambda_grads with the logits of the training pass; method None: ∇_w L alone, without Λ."""
        w = self.net.weight_parameters()
        rng = self._rng(batch[0].device)
        p = self.cell_leaves()
        logits = self.net(batch[0], p)
        loss = self.criterion(logits, batch[1])
        if method is None:
            return WeightGrads(loss.detach(), logits.detach(), torch.autograd.grad(loss, w), None, None)
        grads = torch.autograd.grad(loss, [*w, *p], create_graph=method == "exact")
        dw, g = grads[: len(w)], grads[len(w) :]
        value, u = self.alignment(g, kind)
        if method == "exact":
            normal = [layer for layer, direction in zip(g, u) if direction is not None]
            # The last weights (the classifier's bias) may act on no g_l: their gradient is 0.
            d_lambda = torch.autograd.grad(normal, w, [d for d in u if d is not None], materialize_grads=True)
            return WeightGrads(loss.detach(), logits.detach(), [d.detach() for d in dw], d_lambda, value)
        eps = epsilon / torch.linalg.vector_norm(torch.cat([d.flatten() for d in u if d is not None]))

        def shifted(sign: int) -> tuple[Tensor, ...]:  # ∇_w L at p + sign ε u
            at = [q.detach() if d is None else q.detach() + sign * eps * d for q, d in zip(p, u)]
            with frozen_statistics(self.net):
                return torch.autograd.grad(self._loss(batch, at, rng=rng), w)

        if method == "forward":
            d_lambda = [(up - d) / eps for up, d in zip(shifted(1), dw)]
        else:
            d_lambda = [(up - down) / (2 * eps) for up, down in zip(shifted(1), shifted(-1))]
        return WeightGrads(loss.detach(), logits.detach(), dw, d_lambda, value)

    def alpha_eigenvalue(self, batch: Batch, iterations: int = 20, tolerance: float = 0.01) -> float:
        """The eigenvalue of ∂²L/∂α² on one batch that is largest in magnitude, which grows when a search collapses
        (Zela et al., 2020): power iteration by double backward, from the same direction on every call, changing nothing.
        It ends after `iterations`, or when the value changes by less than `tolerance` of itself.
        """
        device, alphas = batch[0].device, self.net.arch_parameters()
        with frozen_statistics(self.net), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            gradient = torch.autograd.grad(self._loss(batch), alphas, create_graph=True)
            gradient = torch.cat([g.flatten() for g in gradient])
            v, value = torch.randn_like(gradient), 0.0
            for _ in range(iterations):
                v = v / v.norm()
                product = torch.cat([h.flatten() for h in torch.autograd.grad(gradient, alphas, v, retain_graph=True)])
                before, value, v = value, float(v @ product), product
                if abs(value - before) < tolerance * abs(value):
                    break
        return value

    def cell_leaves(self) -> list[Tensor]:
        """A copy p_l of p = softmax(α) for every searched cell, each a leaf of its own."""
        return [p.detach().clone().requires_grad_() for p in self.net.cell_weights()]

    def alignment(self, grads: Sequence[Tensor], kind: str) -> tuple[Tensor, list[Tensor | None]]:
        """Λ over the normal cells and u_l = ∂Λ/∂g_l, None for reduction cells. grads: g_l of every searched cell."""
        leaves = [g.detach().requires_grad_() for g in grads]
        normal = [g for g, cell in zip(leaves, self.net.searched_cells()) if not cell.reduction]
        value = layer_alignment(normal, kind)
        u = iter(torch.autograd.grad(value, normal))
        return value.detach(), [None if cell.reduction else next(u) for cell in self.net.searched_cells()]

    def batch_alignment(self, batch: Batch, kind: str = "cosine") -> Tensor:
        """Λ on one batch, changing nothing."""
        with frozen_statistics(self.net):
            p = self.cell_leaves()
            return self.alignment(torch.autograd.grad(self._loss(batch, p), p), kind)[0]

    def _loss(self, batch: Batch, p: Sequence[Tensor] | None = None, weights: Sequence[Tensor] | None = None,
              rng: Tensor | None = None) -> Tensor:
        """The loss at p and `weights` in the place of the net's; rng: draw the same noise as a pass before did."""
        x, y = batch
        if rng is not None:
            self._set_rng(x.device, rng)
        logits = self.net(x, p) if weights is None else functional_call(
            self.net, dict(zip(self._names, weights)), (x, p))
        return self.criterion(logits, y)

    # A difference between passes needs the same noise in each: only S4 draws any.
    def _rng(self, device: torch.device) -> Tensor | None:
        if not self._noisy:
            return None
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def _set_rng(self, device: torch.device, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)

    @staticmethod
    def _momenta(w: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[Tensor | float]:
        state = optimizer.state if optimizer is not None else {}
        buffers = (state[p].get("momentum_buffer") if p in state else None for p in w)
        return [0.0 if v is None else v for v in buffers]
