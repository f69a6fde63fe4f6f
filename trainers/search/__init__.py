"""The search through S4's design spaces: sample architectures, train and compare them, narrow the space."""

try:
    from .report import write_report as write_report
    from .result import Decision as Decision
    from .result import SearchResult as SearchResult
    from .search import DesignSpaceSearch as DesignSpaceSearch
    from .stopping import LowestShare as LowestShare
    from .training import RunArguments as RunArguments
    from .training import SearchTask as SearchTask
    from .training import share_trunk as share_trunk
    from .trial_queue import Record as Record
    from .trial_queue import Run as Run
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("optuna", "sqlalchemy", "matplotlib"):
        raise
    said = f"A search needs {error.name}: pip install 'hf_peft_ext[search]'."
    raise ModuleNotFoundError(said, name=error.name) from error
