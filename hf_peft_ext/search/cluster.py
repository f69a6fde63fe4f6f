"""Workers of a search as tasks of a Ray cluster (`pip install "hf_peft_ext[ray]"`)."""

import importlib
from collections.abc import Callable
from typing import Any

from hf_peft_ext.search.result import SearchResult
from hf_peft_ext.search.search import DesignSpaceSearch
from hf_peft_ext.validation.checks import check_count


def search_on_ray(make_search: Callable[[], DesignSpaceSearch], num_workers: int, **resources: Any) -> SearchResult:
    """Run workers of one search on a Ray cluster until the search is finished.

    The workers share the search's database, which all machines must reach; on several machines, use a server. Ray
    restarts a worker that dies, and another worker repeats its run.

    Args:
        make_search: creates the search, with model and data, on the worker's machine.
        num_workers: number of workers.
        resources: resources of each worker, for `ray.remote`: `num_cpus`, `num_gpus`, ...

    Returns:
        The finished search.

    Raises:
        ValueError: `num_workers` is not a positive whole number.
    """
    check_count("num_workers", num_workers)
    ray = importlib.import_module("ray")  # an extra, slow to import
    worker: Any = ray.remote(**{"num_cpus": 1, "max_retries": -1, **resources})(work)
    return ray.get([worker.remote(make_search) for _ in range(num_workers)])[0]


def work(make_search: Callable[[], DesignSpaceSearch]) -> SearchResult:
    """Create the search and work on it."""
    return make_search().search()
