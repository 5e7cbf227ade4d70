"""Rules about how a run was set up: tokenizer against model, the schedule, tied weights, tokens that were added."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom


def tokenizer_larger_than_model(history: History) -> list[Symptom] | None:
    """Judge the highest id of the tokenizer against the rows of the embedding. Critical once such an id was fed."""
    setup = history.setup
    if setup is None or setup.tokenizer_size is None or setup.vocabulary is None:
        return None
    if setup.tokenizer_size <= setup.vocabulary:
        return []
    message = f"the tokenizer has ids up to {setup.tokenizer_size - 1:,}, the input embedding {setup.vocabulary:,} rows"
    evidence = {"tokenizer_size": float(setup.tokenizer_size), "vocabulary": float(setup.vocabulary)}
    inputs = history.last.inputs
    fed = inputs is not None and bool(inputs.ids_outside_vocabulary)
    return [Symptom(message, evidence=evidence, severity="critical" if fed else "warning")]


def warm_up_never_ends(history: History) -> list[Symptom] | None:
    """Judge the steps of warm-up against all steps."""
    setup = history.setup
    if setup is None or setup.warmup_steps is None or setup.max_steps is None:
        return None
    if not 0 < setup.max_steps <= setup.warmup_steps:
        return []
    share = setup.max_steps / setup.warmup_steps
    message = f"{setup.warmup_steps:,} steps of warm-up in a training of {setup.max_steps:,}: the learning rate reaches at most {share:.0%}"
    return [Symptom(message, evidence={"warmup_steps": float(setup.warmup_steps), "max_steps": float(setup.max_steps)})]


def head_untied(history: History) -> list[Symptom] | None:
    """Judge whether head and embedding share the weight that the config says they share."""
    setup = history.setup
    if setup is None or setup.ties_head is None or setup.head_is_tied is None:
        return None
    if not setup.ties_head or setup.head_is_tied:
        return []
    return [Symptom("the config says tie_word_embeddings, but the LM head has a weight of its own")]


def new_tokens_not_trained(history: History) -> list[Symptom] | None:
    """Judge whether ids of added tokens are fed into an embedding that is frozen."""
    setup, checks = history.setup, history.last.checks
    if setup is None or setup.embedding_trains is None or checks is None or checks.added_ids is None:
        return None
    if setup.embedding_trains or not checks.added_ids:
        return []
    message = f"{checks.added_ids:,} ids of this step belong to tokens that were added, and the input embedding is frozen"
    return [Symptom(message, evidence={"added_ids": float(checks.added_ids)})]


RULES: tuple[Rule, ...] = (
    Rule(
        code="tokenizer-larger-than-model",
        severity="critical",
        meaning="The tokenizer knows ids for which the model has no embedding. The first batch with one of them ends the training, or, "
        "in models that clamp or hash ids, is read as other tokens. A warning until such an id has been fed.",
        advice="Call model.resize_token_embeddings(len(tokenizer)) before the Trainer is built, or load the tokenizer that belongs to the "
        "checkpoint.",
        threshold="The highest id of the tokenizer is not below the rows of the input embedding. (Fewer ids than rows are usual: rows are "
        "padded to a round number.)",
        check=tokenizer_larger_than_model,
    ),
    Rule(
        code="warm-up-never-ends",
        severity="warning",
        meaning="The warm-up is as long as the training or longer: the learning rate that was asked for is never reached, and "
        "never decays.",
        advice="Set warmup_steps well below max_steps, or give a share (warmup_ratio, or warmup_steps below 1).",
        threshold="Steps of warm-up as the scheduler has them ≥ steps of this training.",
        check=warm_up_never_ends,
    ),
    Rule(
        code="head-untied",
        severity="warning",
        meaning="LM head and input embedding are two weights although the config ties them. They train apart, and a checkpoint keeps only "
        "one of them: after loading the model is another one.",
        advice="Call model.tie_weights() after whatever replaced the head or the embedding, or set config.tie_word_embeddings = False on "
        "purpose.",
        threshold="The config's tie_word_embeddings is true, the class names the head among the weights that it ties, and they are not the "
        "same parameter.",
        check=head_untied,
    ),
    Rule(
        code="new-tokens-not-trained",
        severity="warning",
        meaning="The batches hold tokens that were added to the tokenizer, and nothing trains their rows of the embedding: they keep the "
        "values that they were initialised with.",
        advice='With LoRA give modules_to_save=["embed_tokens", "lm_head"] (or trainable_token_indices); else unfreeze the input '
        "embedding.",
        threshold="Any id of an added token in the step's input_ids while the input embedding (and every adapter of it) is frozen.",
        check=new_tokens_not_trained,
    ),
)
