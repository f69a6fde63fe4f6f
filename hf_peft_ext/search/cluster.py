"""Workers of a search as tasks of a Ray cluster (`pip install "hf_peft_ext[ray]"`)."""

import importlib
from collections.abc import Callable
from typing import Any

from hf_peft_ext.search.result import SearchResult
from hf_peft_ext.search.search import DesignSpaceSearch
from hf_peft_ext.validation.checks import check_count


def search_on_ray(make_search: Callable[[], DesignSpaceSearch], num_workers: int, **resources: Any) -> SearchResult:
    """Let Ray run workers of one search, wherever it has room, until the search is done.

    They meet in the search's database, which all machines must reach: with more than one, a server's. A worker that
    dies is started again by Ray, and its run by another.

    Args:
        make_search: makes the search, model and data included, on the worker's machine.
        num_workers: how many at once.
        resources: of each, as `ray.remote` takes them: `num_cpus`, `num_gpus`, ...

    Raises:
        ValueError: `num_workers` is not a positive whole number.
    """
    check_count("num_workers", num_workers)
    ray = importlib.import_module("ray")  # an extra, and slow to import

    worker: Any = ray.remote(**{"num_cpus": 1, "max_retries": -1, **resources})(work)
    return ray.get([worker.remote(make_search) for _ in range(num_workers)])[0]


def work(make_search: Callable[[], DesignSpaceSearch]) -> SearchResult:
    return make_search().search()
