"""The command line, one file per command.

`oasis_jax.commands.NAME`, with _ for -, has main(argv, program) and is imported only when its command is asked for;
what it needs of JAX it imports inside, so that --help and mistakes in flags do not wait.
"""

# Command -> what it does, as `python -m oasis_jax --help` says it.
COMMANDS = {
    "prepare": "turns text into shards of tokens, to train on with data.corpus=prepared",
    "train": "trains the model of a config, or plans whether that fits on some hardware",
    "eval": "measures trained runs and pretrained models and writes a report",
    "generate": "continues texts with a trained run or a pretrained model",
    "perplexity": "the perplexity of a text in strided windows, by token, word and byte",
    "lm-eval": "runs tasks of the language model evaluation harness",
    "export": "writes a model as safetensors, for this library and, where its family is known, for others",
    "study": "trains and measures a matrix of methods and seeds and tests claims on it",
    "show": "prints a config and what its model is made of, or what differs between two configs",
}
