"""Trains the model of a config: python train.py --config=configs/demo.py --workdir=runs/oasis. See --help."""

from collections.abc import Sequence

from oasis_jax.commands.command_line import parse_train, run_main


def main(argv: Sequence[str] | None = None) -> None:
    config, workdir, processes, profile, plan = parse_train(argv)

    # Imported here, so that --help and mistakes in flags do not wait for JAX.
    if plan is not None:
        from oasis_jax.training.plan import run_plan

        if not run_plan(config, plan):
            raise SystemExit(1)
        return
    if processes is not None:
        from oasis_jax.training.distributed import Processes, start

        start(Processes(*processes))
    from oasis_jax.training.loop import fit
    from oasis_jax.training.profiling import parse_steps

    evaluators = {}
    if config.run.eval_interval:
        from oasis_jax.evaluation import evaluate_model

        evaluators = {"all": evaluate_model}
    fit(config, workdir, evaluators=evaluators, profile=profile and parse_steps(profile))


if __name__ == "__main__":
    run_main(main)
