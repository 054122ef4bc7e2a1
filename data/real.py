"""`make real`: a real policy, real problems, two real teachers, one round and a refresh; docs/results/smollm2.md says how long it took.

Fetches and converts the policy, serves the second teacher on a free loopback port in a process of its own while
traces are generated, then runs recipes/smollm2.toml through the command, and prints what docs/results/smollm2.md records.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE, RUN = ROOT / "recipes" / "smollm2.toml", ROOT / "runs" / "smollm2"
NAMES = (
    "loss/total",
    "loss/sft",
    "loss/grpo",
    "loss/gal",
    "grad_norm",
    "reward",
    "offline_ratio",
    "ess",
    "clip_fraction",
    "entropy",
)
QUESTIONS = {
    "Evals (95 % intervals over problems)": "select suite, metric, round, step, round(value, 3) as value, round(ci_low, 3) as low, "
    "round(ci_high, 3) as high, problems from evals order by all",
    "Grade mix by round and task": "select g.round, p.metadata->>'$.task' as task, count(*) filter (where grade = 'easy') as easy, "
    "count(*) filter (where grade = 'mid') as mid, count(*) filter (where grade = 'hard') as hard from grades g "
    "join prompts p using (prompt_id) group by all order by all",
    "Where prompts went": "select round, reason, count(*) as prompts from grades group by all order by all",
    "Teachers: traces, verified, prompts covered, Hard prompts of round 0 covered": "select s.teacher, count(*) as traces, "
    "count(*) filter (where correct) as verified, count(distinct s.prompt_id) filter (where correct) as prompts, "
    "count(distinct s.prompt_id) filter (where correct and g.grade = 'hard') as hard_prompts from scores s "
    "left join grades g on g.prompt_id = s.prompt_id and g.round = 0 where s.kind = 'trace' group by all order by all",
    "Losses and what they saw": "select round, step, "
    + ", ".join(f"round(any_value(value) filter (where name = '{n}'), 4) as \"{n}\"" for n in NAMES)
    + " from metrics group by round, step order by round, step",
    "Verdicts": "select kind, round, teacher, status, count(*) as n from scores group by all order by all",
}


def main() -> int:
    began = time.monotonic()
    python = sys.executable
    subprocess.run([python, str(ROOT / "data" / "fetch_smollm2.py")], check=True)
    serve = [python, str(ROOT / "data" / "serve_teacher.py"), "--gguf", str(ROOT / "models" / "smollm2.gguf")]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
            print("the teacher's server did not start; its message is above", file=sys.stderr)
            return 1
        setting = f"teachers.server.engine.base_url='{address}'"
        dypo = [python, "-m", "pipeline"]
        subprocess.run([*dypo, "ingest", str(RECIPE)], cwd=ROOT, check=True)
        subprocess.run([*dypo, "generate", "teachers", str(RECIPE), "--set", setting], cwd=ROOT, check=True)
    finally:
        server.terminate()
        server.wait()
    done = subprocess.run([*dypo, "run", str(RECIPE)], cwd=ROOT)
    if done.returncode == 0:
        for title, query in QUESTIONS.items():
            print(f"\n## {title}\n", flush=True)
            subprocess.run([python, "-m", "pipeline", "sql", str(RUN), query], cwd=ROOT, check=True)
        print(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
