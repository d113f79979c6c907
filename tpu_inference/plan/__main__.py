# SPDX-License-Identifier: Apache-2.0
"""The planner's command line. Exits with 0 where the model fits (any of several slices), 1 where it does not, 2 for a question it cannot take."""

import json
import sys
from collections.abc import Sequence

from tpu_inference.errors import TpuInferenceError
from tpu_inference.plan.arguments import Question, parse
from tpu_inference.plan.environment import prepare


def run(question: Question) -> int:
    """Answer, and print."""
    from tpu_inference.plan.model import read_model

    model = read_model(question.model)
    # Slow to import, and not for a question that is refused.
    from tpu_inference.plan import report
    from tpu_inference.plan.answer import answer

    answers = [answer(question, model, where) for where in question.slices]
    if several := len(answers) > 1:
        answers = report.ranked(answers)
    if question.json:
        found = [report.as_json(each, question.prices) for each in answers]
        print(json.dumps({"ranked": found} if several else found[0], indent=2))
    else:
        texts = [report.as_text(each, question.prices) for each in answers]
        table = [f"Ranked\n{report.comparison(answers, question.prices)}"] if several else []
        print("\n\n----\n\n".join([*texts, *table]) + "\n\n" + "\n".join(report.assumptions(answers)))
    if question.plot:
        from tpu_inference.plan.plot import draw

        draw(answers, question.plot)
    return 0 if any(each.memory.fits for each in answers) else 1


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse(argv))
    except TpuInferenceError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    prepare()
    sys.exit(main())
