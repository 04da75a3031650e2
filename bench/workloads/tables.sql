-- Inserts, joins, groups and sorts in memory. All values come from a row's number. bench/programs replaces @ROWS@.
.bail on
PRAGMA temp_store = memory;

CREATE TABLE customer(id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT, score REAL);
CREATE TABLE purchase(id INTEGER PRIMARY KEY, customer INTEGER, item TEXT, amount INTEGER, note TEXT);

BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < @ROWS@ / 20)
INSERT INTO customer SELECT i, printf('customer-%06d', (i * 7919) % 100003), 'city-' || (i % 97),
                            ((i * 104729) % 10007) / 7.0 FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < @ROWS@)
INSERT INTO purchase SELECT i, 1 + (i * 6151) % (@ROWS@ / 20), printf('item-%04d', (i * 31337) % 2003),
                            (i * 48271) % 65537, hex(i * 2654435761 % 4294967296)
                            || substr('the quick brown fox jumps over the lazy dog', 1, i % 44) FROM n;
COMMIT;
CREATE INDEX purchase_customer ON purchase(customer);
CREATE INDEX purchase_item ON purchase(item, amount);

SELECT city, count(*), sum(amount), avg(score) FROM purchase JOIN customer ON customer.id = customer
  GROUP BY city ORDER BY city;
SELECT item, count(DISTINCT customer), max(amount) FROM purchase GROUP BY item ORDER BY 2 DESC, 1 LIMIT 50;
SELECT id, amount FROM purchase ORDER BY note DESC, id LIMIT 20;
SELECT sum(length(text)) FROM (SELECT group_concat(note, ',') AS text FROM purchase GROUP BY item);
SELECT sum(length(text)) FROM (SELECT upper(note) || ':' || replace(item, '-', '--') || ':' || amount AS text
                               FROM purchase);
SELECT sum(total) FROM (SELECT sum(amount) OVER (PARTITION BY customer ORDER BY id) AS total FROM purchase);
SELECT length(json_group_array(json_object('id', id, 'name', name, 'city', city))) FROM customer;
UPDATE purchase SET amount = amount + 1, note = note || note WHERE id % 4 = 0;
CREATE TABLE copied AS SELECT * FROM purchase ORDER BY note, id;
DELETE FROM purchase WHERE id % 3 = 0;
SELECT count(*) FROM (SELECT id FROM copied EXCEPT SELECT id FROM purchase);
DROP TABLE copied;
