"""Design spaces of S4, and a search: sample architectures, train and compare them, narrow the space."""

from hf_peft_ext.search.constraints import ConstraintComparison as ConstraintComparison
from hf_peft_ext.search.constraints import compare_constraints as compare_constraints
from hf_peft_ext.search.space import DesignSpace as DesignSpace

try:
    from hf_peft_ext.search.cluster import search_on_ray as search_on_ray
    from hf_peft_ext.search.report import write_report as write_report
    from hf_peft_ext.search.result import Decision as Decision
    from hf_peft_ext.search.result import SearchResult as SearchResult
    from hf_peft_ext.search.run_record import Record as Record
    from hf_peft_ext.search.run_record import Run as Run
    from hf_peft_ext.search.search import DesignSpaceSearch as DesignSpaceSearch
    from hf_peft_ext.search.stopping import LowestShare as LowestShare
    from hf_peft_ext.search.training import RunArguments as RunArguments
    from hf_peft_ext.search.training import SearchTask as SearchTask
    from hf_peft_ext.search.training import share_trunk as share_trunk
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("optuna", "sqlalchemy", "matplotlib"):
        raise
    message = f"A search needs {package}: pip install 'hf_peft_ext[search]'."
    raise ModuleNotFoundError(message, name=error.name) from error
