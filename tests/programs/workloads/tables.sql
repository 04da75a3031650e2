-- @ROWS@ rows with indexes, joins, aggregates, windows, triggers and VACUUM. All values come from
-- the row's number, so that every run prints the same. The driver replaces @ROWS@.
.bail on
PRAGMA cache_size = -64000;
PRAGMA journal_mode = @JOURNAL@;

CREATE TABLE customer(id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT, score REAL);
CREATE TABLE purchase(id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customer(id), item TEXT,
                      amount INTEGER, paid INTEGER, note TEXT);
CREATE TABLE audit(what TEXT, id INTEGER);

BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
INSERT INTO customer SELECT i, printf('customer-%05d', (i * 7919) % 100003), 'city-' || (i % 37),
                            ((i * 104729) % 10007) / 7.0 FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < @ROWS@)
INSERT INTO purchase SELECT i, 1 + (i * 6151) % 5000, printf('item-%04d', (i * 31337) % 2003),
                            (i * 48271) % 65537, i % 3, substr(hex(i * 2654435761 % 4294967296), 1, 8)
                            || substr('the quick brown fox jumps over the lazy dog', 1, i % 44) FROM n;
COMMIT;

CREATE INDEX purchase_customer ON purchase(customer);
CREATE INDEX purchase_item_amount ON purchase(item, amount DESC);
CREATE UNIQUE INDEX customer_name ON customer(name, id);
CREATE INDEX purchase_unpaid ON purchase(amount) WHERE paid = 0;
CREATE TRIGGER removed AFTER DELETE ON purchase WHEN old.id % 100 = 0
BEGIN INSERT INTO audit VALUES ('delete', old.id); END;
ANALYZE;

SELECT count(*), sum(amount), min(note), max(note), total(length(note)) FROM purchase;
SELECT city, count(*), sum(amount), avg(score) FROM purchase JOIN customer ON customer.id = customer
  GROUP BY city ORDER BY city;
SELECT item, count(DISTINCT customer), max(amount) FROM purchase GROUP BY item HAVING count(*) > 99
  ORDER BY 2 DESC, 1 LIMIT 50;
SELECT a.name, b.item, b.amount FROM customer a JOIN purchase b ON b.customer = a.id
  WHERE a.city = 'city-7' AND b.amount > 64000 ORDER BY b.amount DESC, b.id LIMIT 40;
SELECT id, amount, sum(amount) OVER w, rank() OVER (PARTITION BY customer ORDER BY amount DESC, id)
  FROM purchase WHERE customer < 12 WINDOW w AS (PARTITION BY customer ORDER BY id) ORDER BY id;
SELECT count(*) FROM purchase WHERE note LIKE '%brown%' AND note GLOB '*A*';
SELECT sum(length(text)) FROM (SELECT group_concat(note, ',') AS text FROM purchase GROUP BY item);
SELECT json_group_array(json_object('id', id, 'name', name)) FROM customer WHERE id % 250 = 0;
SELECT length(randomblob(3000000)), length(zeroblob(5000000)), length(hex(zeroblob(2000000)));

BEGIN;
UPDATE purchase SET amount = amount + 1, note = note || note || note WHERE id % 4 = 0;
DELETE FROM purchase WHERE id % 7 = 0;
SAVEPOINT half; DELETE FROM purchase; SELECT count(*) FROM purchase; ROLLBACK TO half;
COMMIT;
SELECT count(*), sum(id) FROM audit;
SELECT count(*), sum(amount), sum(length(note)) FROM purchase;
CREATE TABLE copied AS SELECT * FROM purchase ORDER BY note, id;
SELECT count(*) FROM (SELECT * FROM copied EXCEPT SELECT * FROM purchase);
DROP TABLE copied;
VACUUM;
PRAGMA integrity_check;
PRAGMA foreign_key_check;
SELECT sum(pgsize) FROM dbstat;
