"""The methods once more, written from the papers in plain numpy and float64, to compare the product with.

Nothing of the product is imported here. Everything is a loop over clients, and a client that is not in the cohort
still shrinks its damped memory in every round, as the definition says.
"""

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Gradients = Callable[[Array], Array]
"""From a model `[params]` to the clients' gradients `[clients, params]`."""
Turn = Callable[[Array], Array]
"""A server optimizer: from a method's direction `[params]` to the one that is taken."""


def as_it_is(direction: Array) -> Array:
    """No server optimizer."""
    return direction


def momentum(mu: float) -> Turn:
    """FedAvgM's directions, one after the other."""
    past: list[Array] = []

    def turn(d: Array) -> Array:
        past.append(d)
        return sum((mu ** (len(past) - 1 - i) * d for i, d in enumerate(past)), np.zeros_like(d))

    return turn


def adaptive(kind: str, beta1: float, beta2: float, tau: float, *, bias_correction: bool = False) -> Turn:
    """The directions of Adam, Yogi and Adagrad (arXiv 2003.00295, algorithm 2), one after the other."""
    state = {"m": np.zeros(0), "v": np.zeros(0), "t": 0.0}

    def turn(d: Array) -> Array:
        if state["t"] == 0:
            state["m"], state["v"] = np.zeros_like(d), np.zeros_like(d)
        m, v, t = beta1 * state["m"] + (1 - beta1) * d, state["v"], state["t"] + 1
        if kind == "adam":
            v = beta2 * v + (1 - beta2) * d * d
        elif kind == "yogi":
            v = np.where(v < d * d, v + (1 - beta2) * d * d, v - (1 - beta2) * d * d)
        else:
            v = v + d * d
        state.update(m=m, v=v, t=t)
        if bias_correction:
            m, v = m / (1 - beta1**t), v / (1 - beta2**t)
        return m / (np.sqrt(v) + tau)

    return turn


def normalize(vector: Array, alpha: float) -> Array:
    """N_alpha."""
    return vector / (alpha + np.sqrt(np.sum(vector * vector)))


def clip(vector: Array, radius: float) -> Array:
    """clip_radius."""
    norm = np.sqrt(np.sum(vector * vector))
    return vector if norm <= radius else vector * (radius / norm)


class Rounds:
    """Participants and noise of each round; `[rounds]` of client lists and of `[clients, params]`."""

    def __init__(
        self, count: int, clients: int, prob: float = 1.0, cohorts: Sequence[Array] = (), noise: Sequence[Array] = ()
    ) -> None:
        self.count = count
        self.clients = clients
        self.prob = prob
        self._cohorts = cohorts
        self._noise = noise

    def cohort(self, k: int) -> list[int]:
        return [int(i) for i in self._cohorts[k]] if len(self._cohorts) else list(range(self.clients))

    def noise(self, k: int, client: int) -> Array | float:
        return self._noise[k][client] if len(self._noise) else 0.0


def alpha_normec(
    gradients: Gradients,
    start: Array,
    rounds: Rounds,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    server_normalization: bool,
    sent: bool = False,
    damping: float = 0.0,
    turn: Turn = as_it_is,
) -> list[Array]:
    """The models x^0, x^1, ... of alpha-NormEC, its damped and its sent form."""
    n = rounds.clients
    x, server, own = start.copy(), np.zeros_like(start), [np.zeros_like(start) for _ in range(n)]
    models = [x]
    for k in range(rounds.count):
        slopes, total, learned = gradients(x), np.zeros_like(start), [np.zeros_like(start) for _ in range(n)]
        for i in rounds.cohort(k):
            delta = normalize(slopes[i] - own[i], alpha)
            message = delta + rounds.noise(k, i)
            total += message
            learned[i] = message if sent else delta
        own = [(1.0 - damping) * v + beta * d for v, d in zip(own, learned, strict=True)]
        server = (1.0 - damping) * server + (beta / n) * total
        step = server / np.sqrt(np.sum(server**2)) if server_normalization else server
        x = x - gamma * turn(step)
        models.append(x)
    return models


def clip21(
    gradients: Gradients, start: Array, rounds: Rounds, *, tau: float, gamma: float, turn: Turn = as_it_is
) -> list[Array]:
    """The models x^0, x^1, ... of Clip21."""
    n = rounds.clients
    x, server, own = start.copy(), np.zeros_like(start), [np.zeros_like(start) for _ in range(n)]
    models = [x]
    for k in range(rounds.count):
        slopes, total = gradients(x), np.zeros_like(start)
        for i in rounds.cohort(k):
            c = clip(slopes[i] - own[i], tau)
            own[i] = own[i] + c
            total += c + rounds.noise(k, i)
        server = server + total / n
        x = x - gamma * turn(server)
        models.append(x)
    return models


def clip21_sgd2m(
    gradients: Gradients, start: Array, rounds: Rounds, *, tau: float, b: float, b_hat: float, gamma: float
) -> list[Array]:
    """The models of Clip21-SGD2M, in the order of its paper: the step of x comes first, so x^1 = x^0."""
    n = rounds.clients
    x, g = start.copy(), np.zeros_like(start)
    own, average = [np.zeros_like(start) for _ in range(n)], [np.zeros_like(start) for _ in range(n)]
    models = []
    for k in range(rounds.count + 1):
        x = x - gamma * g
        models.append(x)
        if k == rounds.count:
            break
        slopes = gradients(x)
        for i in rounds.cohort(k):
            average[i] = (1.0 - b) * average[i] + b * slopes[i]
            c = clip(average[i] - own[i], tau)
            own[i] = own[i] + b_hat * c
            g = g + (b_hat / n) * (c + rounds.noise(k, i))
    return models


def scaffold(
    steps: Callable[[Array, int, int, Array], Array],
    start: Array,
    rounds: Rounds,
    *,
    radius: float,
    gamma: float,
) -> list[Array]:
    """The models of DP-SCAFFOLD with clipped changes of the control variates.

    `steps(x, client, round, correction)` is the mean gradient of a client's local steps from x, each of which moves
    along its gradient plus the correction c - c_i.
    """
    n = rounds.clients
    x, c, own = start.copy(), np.zeros_like(start), [np.zeros_like(start) for _ in range(n)]
    models = [x]
    for k in range(rounds.count):
        total = np.zeros_like(start)
        for i in rounds.cohort(k):
            change = clip(steps(x, i, k, c - own[i]) - own[i], radius)
            own[i] = own[i] + change
            total += change + rounds.noise(k, i)
        x = x - gamma * (c + total / (rounds.prob * n))
        c = c + total / n
        models.append(x)
    return models


def local_steps(
    gradient: Callable[[Array, Array | None], Array],
    x: Array,
    batches: Sequence[Array | None],
    *,
    lr: float,
    prox: float = 0.0,
    ascent: float = 0.0,
    correction: Array | float = 0.0,
) -> tuple[Array, list[Array]]:
    """The model after local steps from x, and the gradients of the steps with their proximal part.

    `gradient(y, batch)` is the gradient of the batch's mean loss. A step is taken against that at y + ascent g / ||g||,
    g the gradient at y, plus prox (y - x) and the correction.
    """
    y, taken = x, []
    for batch in batches:
        g = gradient(y, batch)
        if ascent > 0.0:
            g = gradient(y + ascent * g / np.sqrt(np.sum(g * g)), batch)
        taken.append(g + prox * (y - x))
        y = y - lr * (taken[-1] + correction)
    return y, taken


def fedspeed(
    gradient: Callable[[Array, int, Array | None], Array],
    batches: Callable[[int], Sequence[Array | None]],
    start: Array,
    rounds: Rounds,
    *,
    radius: float,
    lam: float,
    rho: float,
    lr: float,
    gamma: float,
) -> list[Array]:
    """The models of FedSpeed in the letters of its paper, with clipped changes of the model at the server."""
    x, g_hat = start.copy(), [np.zeros_like(start) for _ in range(rounds.clients)]
    models = [x]
    for k in range(rounds.count):
        total = np.zeros_like(start)
        for i in rounds.cohort(k):
            own = lambda y, batch, i=i: gradient(y, i, batch)  # noqa: E731
            y, _ = local_steps(own, x, batches(i), lr=lr, prox=1.0 / lam, ascent=rho, correction=-g_hat[i])
            g_hat[i] = g_hat[i] - (y - x) / lam
            total += clip(y - lam * g_hat[i] - x, radius) + rounds.noise(k, i)
        x = x + gamma * total / (rounds.prob * rounds.clients)
        models.append(x)
    return models


def memoryless(
    gradients: Gradients,
    start: Array,
    rounds: Rounds,
    *,
    bounded: Callable[[Array], Array],
    gamma: float,
    turn: Turn = as_it_is,
    beta: float | None = None,
) -> list[Array]:
    """The models of x <- x - gamma mean_i (B(g_i) + z_i), the mean over the expected cohort.

    With `beta`, they are those of v <- v + beta mean_i (B(g_i - v) + z_i) and x <- x - gamma v.
    """
    x, v = start.copy(), np.zeros_like(start)
    models = [x]
    for k in range(rounds.count):
        slopes, total = gradients(x), np.zeros_like(start)
        for i in rounds.cohort(k):
            total += bounded(slopes[i] - v) + rounds.noise(k, i)
        mean = total / (rounds.prob * rounds.clients)
        v = v if beta is None else v + beta * mean
        x = x - gamma * turn(mean if beta is None else v)
        models.append(x)
    return models


class SoftmaxRegression:
    """Clients' mean cross entropies of logits W a + b; the model is W row by row, then b.

    d loss / d W = (p - onehot(y)) a^T and d loss / d b = p - onehot(y), averaged over a client's examples.
    """

    def __init__(self, inputs: Sequence[Array], labels: Sequence[Array], classes: int) -> None:
        self.inputs = [np.asarray(a, dtype=np.float64).reshape(len(a), -1) for a in inputs]
        self.labels = [np.asarray(y) for y in labels]
        self.classes = classes
        self.features = self.inputs[0].shape[1]
        self.size = classes * (self.features + 1)

    def gradient(self, x: Array, client: int, batch: Array | None = None) -> Array:
        """The gradient `[params]` of one client's mean loss, or of that over a batch of its examples."""
        a, y = self.inputs[client], self.labels[client]
        if batch is not None:
            a, y = a[batch], y[batch]
        split = self.classes * self.features
        logits = a @ x[:split].reshape(self.classes, self.features).T + x[split:]
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        errors = scores / scores.sum(axis=1, keepdims=True)
        errors[np.arange(len(y)), y] -= 1.0
        return np.concatenate([(errors.T @ a).ravel(), errors.sum(axis=0)]) / len(y)

    def loss(self, x: Array, client: int) -> float:
        """One client's mean loss in nats."""
        a, y = self.inputs[client], self.labels[client]
        split = self.classes * self.features
        logits = a @ x[:split].reshape(self.classes, self.features).T + x[split:]
        largest = logits.max(axis=1, keepdims=True)
        log_scores = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
        return float(-log_scores[np.arange(len(y)), y].mean())

    def walk(self, x: Array, client: int, lr: float, batches: Sequence[Array]) -> Array:
        """Return the end of steps of length `lr` on one client's batches lead from x."""
        for batch in batches:
            x = x - lr * self.gradient(x, client, batch)
        return x

    def gradients(self, x: Array) -> Array:
        """All clients' gradients `[clients, params]`."""
        return np.stack([self.gradient(x, client) for client in range(len(self.inputs))])


def rows_of(model: Array, inputs: Array, labels: Array) -> Array:
    """The gradients `[examples, params]` of the cross entropies, by their formula."""
    width = inputs.shape[1]
    weight, bias = model[: 10 * width].reshape(10, width), model[10 * width :]
    logits = inputs @ weight.T + bias
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    probs[np.arange(len(labels)), labels] -= 1.0
    return np.concatenate([(probs[:, :, None] * inputs[:, None, :]).reshape(len(labels), -1), probs], axis=1)


def clipped(rows: Array, clip: float) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1.0, clip / np.maximum(norms, 1e-300))
