// Workers, buffers, JSON, child processes, zlib, and an HTTP server with its clients, in one program.
import { createHash, randomBytes } from "node:crypto";
import { execFileSync, spawn } from "node:child_process";
import http from "node:http";
import { promisify } from "node:util";
import { Worker, isMainThread, parentPort, workerData } from "node:worker_threads";
import zlib from "node:zlib";

const digest = (data) => createHash("sha256").update(data).digest("hex").slice(0, 16);

function* numbers(seed) {
  for (let state = seed; ; ) yield (state = (Math.imul(state, 1103515245) + 12345) >>> 1);
}

function buffers(seed) {
  const random = numbers(seed);
  const kept = new Map();
  const hash = createHash("sha256");
  for (let i = 0; i < 6000; i++) {
    const size = random.next().value % (i % 50 === 0 ? 400_000 : 4_000);
    kept.set(random.next().value % 300, Buffer.alloc(size, i & 255));
    if (i % 100 === 0) hash.update(Buffer.concat([...kept.values()]));
  }
  return hash.digest("hex").slice(0, 16);
}

if (!isMainThread) {
  const shared = new Int32Array(workerData.shared);
  for (let i = 0; i < 10_000; i++) Atomics.add(shared, i % shared.length, 1);
  parentPort.postMessage({ seed: workerData.seed, result: buffers(workerData.seed) });
} else {
  await main();
}

async function workers() {
  const shared = new SharedArrayBuffer(4096);
  const replies = await Promise.all(
    [1, 2, 3, 4, 5, 6].map((seed) => new Promise((resolve, reject) => {
      new Worker(new URL(import.meta.url), { workerData: { seed, shared } })
        .on("message", resolve).on("error", reject);
    })));
  const sum = new Int32Array(shared).reduce((a, b) => a + b, 0);
  console.log("workers", JSON.stringify(replies), sum);
}

function objects() {
  const random = numbers(77);
  const rows = Array.from({ length: 60_000 }, (_, id) => ({
    id, name: `name-${random.next().value}`, tags: [id % 7, `t${id % 13}`], nested: { half: id / 2 } }));
  const text = JSON.stringify(rows);
  const back = JSON.parse(text);
  back.sort((a, b) => (a.name < b.name ? -1 : 1));
  console.log("json", text.length, digest(text), digest(JSON.stringify(back.slice(0, 1000))));
  const map = new Map(rows.map((row) => [row.name, row]));
  for (const row of rows) if (row.id % 3) map.delete(row.name);
  console.log("map", map.size, "typed", digest(new Float64Array(500_000).map((_, i) => i / 3)));
}

async function compression() {
  const data = Buffer.from(Array.from({ length: 300_000 }, (_, i) => `${(i * 7919) % 10007}\n`).join(""));
  const packed = await Promise.all([1, 6, 9].map((level) => promisify(zlib.gzip)(data, { level })));
  const restored = await Promise.all(packed.map((part) => promisify(zlib.gunzip)(part)));
  const bodies = packed.map((part) => part.subarray(10));  // Without the header's time and system.
  console.log("zlib", restored.every((part) => part.equals(data)), digest(Buffer.concat(bodies)));
}

async function children() {
  console.log("child", execFileSync("sort", ["-r"], { input: "a\nc\nb\n" }).toString());
  const nested = "process.stdin.on('data', d => n += d.length).on('end', () => console.log(n)); let n = 0;";
  const outputs = await Promise.all([1, 2, 3].map((factor) => new Promise((resolve) => {
    const child = spawn(process.execPath, ["-e", nested]);
    let said = "";
    child.stdout.on("data", (data) => (said += data));
    child.on("close", (code, signal) => resolve([said.trim(), code, signal]));
    child.stdin.end("x".repeat(100_000 * factor));
  })));
  console.log("children", JSON.stringify(outputs));
  const killed = await new Promise((resolve) => {
    const child = spawn("sleep", ["60"]).on("close", (code, signal) => resolve([code, signal]));
    child.kill("SIGTERM");
  });
  console.log("killed", JSON.stringify(killed));
}

async function server() {
  const app = http.createServer((request, response) => {
    const hash = createHash("sha256");
    let length = 0;
    request.on("data", (part) => { hash.update(part); length += part.length; });
    request.on("end", () => {
      response.setHeader("content-type", "application/json");
      response.end(JSON.stringify({ url: request.url, length, hash: hash.digest("hex"),
                                    padding: "p".repeat(length % 5000) }));
    });
  });
  await new Promise((resolve) => app.listen(0, "127.0.0.1", resolve));
  const { port } = app.address();
  const agent = new http.Agent({ keepAlive: true, maxSockets: 16 });

  const post = (number) => new Promise((resolve, reject) => {
    const body = Buffer.alloc((number * 37) % 60_000, number & 255);
    const options = { port, host: "127.0.0.1", method: "POST", path: `/item/${number}`, agent };
    http.request(options, (response) => {
      const parts = [];
      response.on("data", (part) => parts.push(part));
      response.on("end", () => {
        const reply = JSON.parse(Buffer.concat(parts));
        const right = reply.length === body.length && reply.url === `/item/${number}` &&
                      reply.hash === createHash("sha256").update(body).digest("hex");
        resolve(right ? 1 : 0);
      });
    }).on("error", reject).end(body);
  });

  const results = await Promise.all(Array.from({ length: 2500 }, (_, number) => post(number)));
  console.log("http", results.length, results.reduce((a, b) => a + b, 0));
  agent.destroy();
  await new Promise((resolve) => app.close(resolve));
}

async function main() {
  await workers();
  objects();
  await compression();
  await children();
  await server();
  console.log("random", randomBytes(1 << 20).length);
}
