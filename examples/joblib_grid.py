"""A grid search with joblib: which penalty suits a ridge regression, by cross-validation.

    python examples/joblib_grid.py       prints best penalty 100.00, mean squared error 10.4972

It starts four nodes of its own and takes them down; where `manifold up` runs it uses those. Each of
the 25 penalties is tried on the five folds of eight shuffles: 1000 fits, each on its own as far as
joblib is concerned, which packs them into batches. Without the `with` line the same program runs in
processes of this machine alone.
"""

from __future__ import annotations

import joblib
import numpy as np
from joblib import Parallel, delayed

import manifold
import manifold.joblib  # makes the backend known

SAMPLES, FEATURES, FOLDS = 150, 60, 5
PENALTIES = [10 ** (exponent / 4) for exponent in range(-8, 17)]
SEEDS = range(8)


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Measurements of which only every third feature says anything, with noise."""
    random = np.random.default_rng(5)
    x = random.normal(size=(SAMPLES, FEATURES))
    weights = random.normal(size=FEATURES) * (np.arange(FEATURES) % 3 == 0)
    return x, x @ weights + random.normal(scale=3.0, size=SAMPLES)


def fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + penalty * np.eye(FEATURES), x.T @ y)


def squared_error(x: np.ndarray, y: np.ndarray, penalty: float, seed: int, fold: int) -> float:
    """Of what is left out, by the weights of what is not."""
    part = np.random.default_rng(seed).permutation(SAMPLES) % FOLDS
    weights = fitted(x[part != fold], y[part != fold], penalty)
    return float(np.mean((x[part == fold] @ weights - y[part == fold]) ** 2))


def main() -> None:
    x, y = samples()
    grid = [(p, seed, fold) for p in PENALTIES for seed in SEEDS for fold in range(FOLDS)]
    with manifold.connect(up=4) as m, joblib.parallel_config("manifold", client=m):
        errors = Parallel()(delayed(squared_error)(x, y, *point) for point in grid)
    means = np.reshape(errors, (len(PENALTIES), -1)).mean(axis=1)
    best = int(np.argmin(means))
    print(f"best penalty {PENALTIES[best]:.2f}, mean squared error {means[best]:.4f}")


if __name__ == "__main__":
    main()
