"""Small programs, many of them: shells, pipelines, forks."""

from harness import check, require


@check
def small_programs(trial):
    """Core utilities, each a process of its own."""
    for argv in (["ls", "-la", "/usr/lib/git-core"], ["id"], ["uname", "-a"], ["date", "-d", "@0"],
                 ["find", "/usr/lib/git-core", "-name", "*commit*"], ["du", "-s", "/usr/lib/git-core"],
                 ["sha256sum", "/usr/bin/perl"], ["seq", "1", "7", "20000"], ["factor", "1234567890123"],
                 ["awk", "BEGIN { for (i = 0; i < 200000; i++) a[i % 997] += i; print a[3], a[996] }"],
                 ["sed", "-n", "s/:.*//p", "/etc/passwd"], ["getent", "passwd", "root"]):
        trial.compare(argv)


@check
def pipelines(trial):
    """bash running some 1500 processes in pipelines, subshells and substitutions."""
    plain = trial.compare(["bash", "-c", r"""
set -o pipefail
for i in $(seq 1 150); do
  seq 1 $((i * 20)) | awk -v i=$i '{ print ($1 * 7919 + i) % 1000 }' | sort -n | uniq -c \
    | tr -s ' ' | cut -d' ' -f2,3 | cksum
  (x=$(printf '%s' $i | tr 1-9 2-91); echo "$x $(( (i * i) % 97 ))")
done
declare -A words
while read -r word; do words[$word]=$(( ${words[$word]:-0} + ${#word} )); done \
  < <(seq 1 20000 | sed 's/\(..\)$/ \1/; s/.* //')
for word in "${!words[@]}"; do echo "$word ${words[$word]}"; done | sort
big=$(head -c 3000000 /dev/zero | tr '\0' 'x'); big+=$big; echo ${#big} ${big:5999990}
"""])
    require(plain.stdout.count(b"\n") > 390, "the pipelines did not run to their end")


@check
def background_jobs(trial):
    """Processes that run at the same time, waited for one by one."""
    trial.compare(["bash", "-c", r"""
mkfifo pipe
for i in $(seq 1 40); do
  ( seq 1 2000 | sha256sum > out.$i; exit $((i % 5)) ) &
  pids[$i]=$!
done
( seq 1 50000 > pipe ) & wc -l < pipe
for i in $(seq 1 40); do wait ${pids[$i]}; echo "$i $?"; done
cat out.* | sort | uniq -c
rm pipe
"""])


@check
def clean_environment(trial):
    """A child that is started without the shim's variables runs as if there were no shim."""
    trial.compare(["env", "-i", "-C", "/", "/bin/sh", "-c", "echo $((6 * 7)); "
                   "/usr/bin/seq 3 | /usr/bin/sort -r; /usr/bin/env | /usr/bin/sort"])
