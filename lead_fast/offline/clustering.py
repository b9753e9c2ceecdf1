"""Arms and tasks: K-means on difficulty, then on prompt embeddings inside each arm (section 2)."""

from __future__ import annotations

import logging

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits
from tqdm import tqdm

logger = logging.getLogger(__name__)

_MINI_BATCH_ROWS = 50_000


def difficulty_arms(difficulty: np.ndarray, num_arms: int, *, seed: int) -> np.ndarray:
    """Arms by K-means on difficulty, numbered from the easiest.

    Args:
        difficulty: fp32 [N].
        num_arms: K; fewer arms result where fewer distinct difficulties, or rows, exist, which is logged.

    Returns:
        int16 [N].
    """
    distinct = len(np.unique(difficulty))
    if distinct < num_arms:
        logger.warning("the pool has %d distinct difficulties: %d arms instead of %d", distinct, distinct, num_arms)
        num_arms = distinct
    labels = _kmeans(difficulty.astype(np.float64)[:, None], num_arms, seed)
    centers = np.array([difficulty[labels == k].mean() for k in range(num_arms)])
    rank = np.empty(num_arms, np.int16)
    rank[np.argsort(centers, kind="stable")] = np.arange(num_arms)
    return rank[labels]


def fine_tasks(arm: np.ndarray, embedding: np.ndarray, tasks_per_arm: int, *, seed: int) -> np.ndarray:
    """Tasks by K-means on embeddings inside each arm, numbered over the whole pool.

    Args:
        arm: int16 [N]; -1 for rows without an arm, which get task -1.
        embedding: fp16 [N, D].
        tasks_per_arm: clusters of an arm; never more than it has distinct embeddings.

    Returns:
        int32 [N].
    """
    task = np.full(len(arm), -1, np.int32)
    first = 0
    for k in tqdm(range(int(arm.max()) + 1), desc="clustering", unit="arm", delay=2, leave=False):
        rows = np.flatnonzero(arm == k)
        vectors = embedding[rows].astype(np.float64)
        count = min(tasks_per_arm, len(np.unique(vectors, axis=0)))
        task[rows] = first + _kmeans(vectors, count, seed)
        first += count
    return task


def _kmeans(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    seed %= 2**32  # of NumPy's generator of old
    # One thread: several sum the centers in an order that varies, and the last bit can move a row.
    with threadpool_limits(1):
        if len(points) > _MINI_BATCH_ROWS and points.shape[1] > 1:
            return MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=8192).fit_predict(points)  # pyright: ignore[reportArgumentType]
        return KMeans(clusters, random_state=seed, n_init=10).fit_predict(points)  # pyright: ignore[reportArgumentType]
