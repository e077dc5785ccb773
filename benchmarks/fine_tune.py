"""Fine-tune a classifier from a parent encoder, so that there are checkpoints to merge.

    python benchmarks/fine_tune.py PARENT DATA OUT

``DATA`` is a folder with ``train.jsonl`` and ``validation.jsonl`` (``sentence1``, ``sentence2`` for pairs, and
``label``, an index) and ``labels.json``, the labels' names. AdamW, batch 32, linear decay. Prints the accuracy on the
validation rows as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy
import transformers


def table(file: Path, tokenizer: Any, indices: list[int], max_length: int, rows: int | None) -> Any:
    """The rows of a file as the model takes them."""
    loaded = datasets.load_dataset("json", data_files=str(file), split="train")
    if rows is not None:
        loaded = loaded.shuffle(seed=0).select(range(min(rows, len(loaded))))
    columns = [name for name in ("sentence1", "sentence2") if name in loaded.column_names]

    def encode(batch: Any) -> Any:
        encoded = tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length)
        return {**encoded, "labels": [indices[label] for label in batch["label"]]}

    return loaded.map(encode, batched=True, remove_columns=loaded.column_names)


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float(numpy.mean(found.predictions.argmax(-1) == found.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parent", type=Path, help="an encoder's folder")
    parser.add_argument("data", type=Path, help="a folder with train.jsonl, validation.jsonl and labels.json")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rate", type=float, default=8e-5, help="learning rate [default: %(default)s]")
    parser.add_argument("--rows", type=int, help="training rows to draw [default: all]")
    parser.add_argument("--max-length", type=int, default=96, help="tokens per row [default: %(default)s]")
    parser.add_argument(
        "--names", help="other label names, with commas between; the same name twice makes one label"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    names = json.loads((options.data / "labels.json").read_text())
    if options.names:
        given = options.names.split(",")
        if len(given) != len(names):
            parser.error(f"--names: expected {len(names)} names, got {len(given)}")
        names = given
    labels = list(dict.fromkeys(names))
    indices = [labels.index(name) for name in names]
    transformers.set_seed(options.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.parent, model_max_length=512)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        options.parent,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    train, held_out = (
        table(options.data / file, tokenizer, indices, options.max_length, rows)
        for file, rows in (("train.jsonl", options.rows), ("validation.jsonl", None))
    )
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.out),
            num_train_epochs=options.epochs,
            learning_rate=options.rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(
        json.dumps({"rows": len(train), "validation_rows": len(held_out), "accuracy": found["eval_accuracy"]})
    )


if __name__ == "__main__":
    main()
