"""The tests that `make test` leaves out: each compiles for long what shorter ones cover for the most part."""

import re

# How their names begin, as expressions; `make test ARGS="-m long"` runs them.
NAMES = r"""
kernels/test_compile.py::test_every_kernel_compiles\[(v5e|v5p|a100|l4)
kernels/test_decode_attention.py::test_tpu_kernel_over_several_blocks\[.*(?<!1)\]
kernels/test_vq_topk.py::test_kernels_cut_thresholds_anywhere
laws/test_memory.py::test_the_compiled_step_makes_no_copy.*\+
laws/test_method_kernels.py::test_kernels_change_nothing\[([a-z0-9_]+|.*\+kivi8|knorm\+quest)-gpu
laws/test_method_kernels.py::test_kernels_change_nothing\[(h2o|kivi|knorm|snapkv|streaming_llm|tova)-tpu
laws/test_methods.py::test_(chunked_prefill|empty_slots).*G1
laws/test_methods.py::test_full_budget_is_dense\[G1.*window-(?!chelsea)
laws/test_methods.py::test_jit_changes_nothing\[(?!a2ats|chelsea|leoam|full)
laws/test_methods.py::test_memory_of_a_ragged_table_is_its_sum\[(.*\+|h2o|knorm|streaming_llm|tova)
laws/test_methods.py::test_output_is_finite.*\[(h2o|kivi|knorm|snapkv|streaming_llm|tova)-G1
laws/test_replay.py::test_replay_leaves.*(\[a\swindow|-(knorm|h2o|snapkv|streaming_llm|tova)\])
smoke/test_a2ats.py::test_quality
smoke/test_a2ats_speed.py::test_every_part
smoke/test_chelsea.py::test_every_row_is_measured_once_and_drawn\[(quality|sweep)
smoke/test_chelsea.py::test_a_sweep_lets_go
smoke/test_chelsea_speed.py::test_every_part
smoke/test_chess.py::test_(steps_are_timed|methods_are_scored)
smoke/test_leoam.py::test_quality
smoke/test_leoam_faults.py
smoke/test_leoam_speed.py
smoke/test_notebooks.py::.*(calibrat|codebooks|long_context|test_a_context)
unit/test_a2ats.py::test_an_index_that_grew
unit/test_calibrate_chess.py::test_(chess_errs_less|refinement_loses)
unit/test_chelsea.py::test_masses_are
unit/test_chunk_tree.py::test_(a_tree_that_grew|scores_are)
unit/test_cli.py::test_(calibrated_budgets|shares_and|what_was_read)
unit/test_contexts.py::test_a_state_of_any_method.*\[(.*\+|h2o|knorm|snapkv|streaming_llm|tova)
unit/test_disk.py::test_any_budgets_give_the_same_bits\[more[12]
unit/test_disk.py::test_a_context_is_opened_with_other_budgets.*where1
unit/test_disk.py::test_what_was_sealed.*where1
unit/test_generate.py::test_a_state_that_cannot_hold.*(windows1|tova|streaming_llm|h2o|knorm)
unit/test_harness.py::test_(an_answer_ends|likelihoods_are)
unit/test_host_programs.py::test_programs_compile_for_a_tpu.*v5[ep]
unit/test_host_programs.py::test_(programs_for_a_gpu|abstracts_on_the_host)
unit/test_leoam.py::test_the_host_gives_what_the_device_gives\[changes[1-4]
unit/test_leoam.py::test_heads_of_unequal
unit/test_lru.py::test_simulated_lines.*G2
unit/test_prefill_attention.py::test_the_library.*v5e
unit/test_sharding.py::test_(every_method|the_step|a_method)
unit/test_sparse_programs.py::test_sparse_steps_compile
unit/test_step_programs.py::test_temporaries
unit/test_thresholds.py::test_a_gate_that_is_sparse
unit/test_thresholds.py::test_kernels_change_nothing.*False
unit/test_tiers.py::test_the_host_gives_the_bits_of_the_device\[how[123]
unit/test_tiers.py::test_(prompts_of_different|pages_of_a_tpu)
"""
_LONG = [re.compile("tests/" + name) for name in NAMES.split()]


def is_long(name: str) -> bool:
    """Whether a test is one of these: `tests/file.py::test[case]`."""
    return any(long.match(name) for long in _LONG)
