"""The functions of lm-eval's ifeval, for the local YAML file beside this one."""

from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

__all__ = ["agg_inst_level_acc", "process_results"]
