create table facts as
  select i as id, i % 1009 as grp, md5(i::text) as word, (i * 7919) % 100003 as value from generate_series(1, 150000) i;
analyze facts;
-- The ways to compute: alone and in memory; spilled; in parallel; compiled.
set jit = off; set max_parallel_workers_per_gather = 0; set work_mem = '256MB';
select count(*), sum(value), min(word), max(word) from facts;
select grp, count(*), sum(value) from facts group by grp order by grp limit 20;
select md5(string_agg(word, ',' order by word desc)) from facts;
select sum(x) from (select sum(a.value) over (partition by a.grp order by a.id) as x from facts a) t;
set work_mem = '64kB';
select md5(string_agg(word, ',')) from (select word from facts order by word) t;
explain (analyze, costs off, timing off, summary off) select word from facts order by word;
select count(*) from facts a join facts b on a.value = b.id;
set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
set min_parallel_table_scan_size = 0; set work_mem = '16MB';
select count(*), sum(a.value + b.value) from facts a join facts b on a.value = b.id;
explain (analyze, costs off, timing off, summary off) select sum(value) from facts;
set jit = on; set jit_above_cost = 0; set jit_inline_above_cost = 0; set jit_optimize_above_cost = 0;
select sum(value * 3 + length(word)), count(distinct grp) from facts where value % 3 = 1;
select 'JIT:' from (select 1) t where pg_jit_available();
set maintenance_work_mem = '64MB';
create index on facts (word); create index on facts using gin (to_tsvector('simple', word));
select count(*) from facts where word between '2' and '5';
select count(*) from facts where to_tsvector('simple', word) @@ to_tsquery('simple', md5('77'));
do $$ declare t text := ''; begin for i in 1..2000 loop t := t || md5(i::text); end loop;
  create table big as select t as body from generate_series(1, 50); end $$;
select sum(length(body)), md5(min(body)) from big;
