"""git: a repository built deterministically, cloned, repacked, checked; object names are the evidence."""

import random

from harness import check, require, tail

# No configuration but this, and fixed names and times, so that object names are reproducible.
ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "A U Thor", "GIT_AUTHOR_EMAIL": "author@example.com",
    "GIT_COMMITTER_NAME": "C O Mitter", "GIT_COMMITTER_EMAIL": "committer@example.com",
    "GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000"}


def _history(commits):
    """A fast-import stream: commits that edit a few of 200 text files each, and two branches."""
    rng = random.Random(3)
    files = [[f"file {number} line {line} {rng.random()}" for line in range(rng.randrange(20, 400))]
             for number in range(200)]
    for mark in range(1, commits + 1):
        branch = "side" if mark % 10 == 0 else "main"
        yield (f"commit refs/heads/{branch}\nmark :{mark}\n"
               f"committer C O Mitter <committer@example.com> {1600000000 + mark * 60} +0000\n"
               f"data <<END\ncommit {mark}\nEND\n")
        if branch == "side" and mark > 10:
            yield f"merge :{mark - 1}\n"
        for number in rng.sample(range(200), 4):
            lines = files[number]
            lines[rng.randrange(len(lines))] = f"changed by {mark} {rng.random()}"
            if rng.random() < 0.3:
                lines.insert(rng.randrange(len(lines)), f"inserted by {mark}")
            content = "\n".join(lines) + "\n"
            yield f"M 100644 inline dir{number % 12}/file{number}\ndata {len(content)}\n{content}\n"
    yield "done\n"


REPACK_AND_CHECK = """
git init -q --bare -b main origin.git
git -C origin.git fast-import --quiet --done
git clone -q --no-local origin.git clone 2>&1
cd clone
git config pack.threads {threads}
git gc -q --aggressive --prune=now
git fsck --full --strict 2>&1
git rev-parse main HEAD origin/side origin/side^2 2>&1
git log --all --format='%H %T %s' | sha256sum
git log --stat -p main | sha256sum
git cat-file --batch-all-objects --batch-check | sha256sum
git count-objects -v | grep -v size
git rev-list --objects --all | wc -l
git blame -s dir3/file3 | sha256sum
git grep -c 'changed by' main | sha256sum
git verify-pack .git/objects/pack/*.idx
git archive main | sha256sum
git bundle create -q ../all.bundle --all
git clone -q ../all.bundle ../again 2>&1
git -C ../again rev-parse HEAD HEAD^{{tree}}
git status --short
"""

WORK_IN_TREE = """
git init -q -b main work
cd work
for i in $(seq 1 40); do
  mkdir -p d$((i % 5)); seq $i $((i * 30)) > d$((i % 5))/f$((i % 11)).txt
  git add -A; git commit -q -m "commit $i" --allow-empty
  if [ $((i % 8)) = 0 ]; then git branch b$i HEAD~3; fi
done
git checkout -q b16; echo other > other; git add other; git commit -q -m other
git checkout -q main; git merge -q -m merged b16 b24
git rebase -q --root --onto b8 main~4 >/dev/null 2>&1 || git rebase --abort
git cherry-pick --allow-empty --keep-redundant-commits main~1 >/dev/null 2>&1 || git cherry-pick --abort
git reset -q --hard main; git stash list
git log --graph --oneline --all | sha256sum
git diff --stat HEAD~20 | tail -1
git for-each-ref --format='%(objectname) %(refname)'
git gc -q; git fsck --strict; git reflog | wc -l
"""


@check
def history(trial):
    """A thousand commits imported, cloned, gc --aggressive, fsck; same objects, same pack."""
    commits = 5000 if trial.long else 1000
    # One packing thread: which deltas two of them find depends on timing, and a pack is named by its
    # content.
    script = REPACK_AND_CHECK.format(threads=1) + "ls .git/objects/pack\n"
    plain = trial.compare(["sh", "-ec", script],
                          stdin="".join(_history(commits)).encode(), env=ENVIRONMENT,
                          witnesses=["git"], timeout=900)
    require(b"\npacks: 1\n" in plain.stdout, f"the history was not packed: {tail(plain)}")


@check
def threaded_packing(trial):
    """The same with two packing threads."""
    trial.compare(["sh", "-ec", REPACK_AND_CHECK.format(threads=2)],
                  stdin="".join(_history(600)).encode(), env=ENVIRONMENT, witnesses=["git"],
                  timeout=900)


@check
def work_in_tree(trial):
    """Everyday commands: add, commit, branch, merge, rebase, cherry-pick."""
    trial.compare(["sh", "-c", WORK_IN_TREE], env=ENVIRONMENT)
