"""Encoders: BERT and everything built like it, and a few that are not."""

from tests.families.family import HIDDEN, NEURONS, PAD, VOCABULARY, Fails, Family, Loses, requires

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "num_labels": 3,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": NEURONS,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "num_labels": 3,
}
MODERN = BERT | {
    "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4, "local_attention": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip
DEBERTA = BERT | {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    "max_relative_positions": 16,
}  # fmt: skip
DEBERTA_V3 = DEBERTA | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
CANINE = {name: value for name, value in BERT.items() if name != "vocab_size"} | {
    "bos_token_id": 1, "eos_token_id": 2, "num_hash_buckets": 16, "local_transformer_stride": 4,
}  # fmt: skip
FNET = {name: value for name, value in BERT.items() if name != "num_attention_heads"} | {
    "tpu_short_seq_length": 12
}
MHA = (("", 4, 4),)

ENCODERS = (
    # With a file of mergekit's.
    Family("bert", "BertModel", BERT, json="bert", heads=MHA, merge=Fails("TypeError", "can only concatenate list")),
    Family("bert-masked-lm", "BertForMaskedLM", BERT, json="bert-masked-lm", heads=MHA, merge=requires("bert.pooler.dense.weight")),
    Family("bert-sequence", "BertForSequenceClassification", BERT, json="bert-sequence-classification", heads=MHA),
    Family("bert-token", "BertForTokenClassification", BERT, json="bert-sequence-classification", heads=MHA),
    Family("bert-choice", "BertForMultipleChoice", BERT, "choices", "bert-sequence-classification", MHA),
    Family("roberta", "RobertaModel", BERT, json="roberta", heads=MHA, merge=requires("roberta.embeddings.position_embeddings.weight")),
    Family("roberta-masked-lm", "RobertaForMaskedLM", BERT, json="roberta-masked-lm", heads=MHA),
    Family("roberta-sequence", "RobertaForSequenceClassification", BERT, json="roberta-sequence-classification", heads=MHA),
    Family("roberta-token", "RobertaForTokenClassification", BERT, json="roberta-token-classification", heads=MHA),
    Family("distilbert", "DistilBertModel", DISTILBERT, json="distilbert", heads=MHA, merge=requires("distilbert.embeddings.position_embeddings.weight")),
    Family("distilbert-masked-lm", "DistilBertForMaskedLM", DISTILBERT, json="distilbert-masked-lm", heads=MHA),
    Family("distilbert-sequence", "DistilBertForSequenceClassification", DISTILBERT, json="distilbert-sequence-classification", heads=MHA),
    Family("distilbert-token", "DistilBertForTokenClassification", DISTILBERT, json="distilbert-token-classification", heads=MHA),
    # Inferred.
    Family("bert-chunked", "BertForSequenceClassification", BERT | {"chunk_size_feed_forward": 4}, json="bert-sequence-classification", heads=MHA),
    Family("bert-question", "BertForQuestionAnswering", BERT | {"num_labels": 2}, heads=MHA, merge=Loses(("qa_outputs.",))),
    Family("roberta-question", "RobertaForQuestionAnswering", BERT | {"num_labels": 2}, heads=MHA, merge=Loses(("qa_outputs.",))),
    Family("xlm-roberta", "XLMRobertaForSequenceClassification", BERT, heads=MHA),
    Family("camembert", "CamembertForSequenceClassification", BERT, heads=MHA),
    Family("electra", "ElectraForSequenceClassification", BERT | {"embedding_size": 16}, heads=MHA),
    Family("mpnet", "MPNetForSequenceClassification", BERT, heads=MHA),
    Family("ernie", "ErnieForSequenceClassification", BERT, heads=MHA),
    Family("layoutlm", "LayoutLMForSequenceClassification", BERT, heads=MHA),
    Family("nomic-bert", "NomicBertForSequenceClassification", BERT, heads=MHA),
    Family("modernbert", "ModernBertForSequenceClassification", MODERN, heads=MHA),
    Family("modernbert-masked-lm", "ModernBertForMaskedLM", MODERN, heads=MHA),
    Family("deberta-v1", "DebertaForSequenceClassification", DEBERTA, heads=MHA),
    Family("deberta-v2", "DebertaV2ForSequenceClassification", DEBERTA, heads=MHA),
    Family("deberta-v3", "DebertaV2ForSequenceClassification", DEBERTA_V3, heads=MHA),
    Family("albert", "AlbertForSequenceClassification", BERT | {"embedding_size": 16}, heads=MHA),
    Family("canine", "CanineForSequenceClassification", CANINE, heads=MHA, merge=Fails("NotImplementedError", "`get_input_embeddings` not auto")),
    Family("fnet", "FNetForSequenceClassification", FNET, "text without mask", sites=("ffn",)),
)  # fmt: skip
