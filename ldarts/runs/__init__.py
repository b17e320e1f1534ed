"""A run: its command line, its folder, and its results.

arguments: the flags of both scripts; folder: Run; files: its files, written and read; machine: device,
precision, seeds; derived: the network of train_eval.py; results: the table.
"""
from ..distributed import evaluate
from ..errors import script
from .arguments import Parser, one_of, parse_eval_args, parse_search_args, uses_graph
from .derived import check_images, count_multiply_adds, count_parameters, load_weights, safe_layout
from .files import (load_checkpoint, read_config, read_metrics, read_run, script_path, unfinished,
                    write_atomically)
from .folder import Run
from .machine import (AMP, MEMORY_FORMATS, amp_dtype, device_name, machine_facts, pick_device,
                      seed_everything, set_deterministic)
from .results import grouped, main, spread, table
