// node runtimes.js FOLDER NODE_MODULES CASES ONLY CHROMIUM: see runtimes.py, which calls it and compares its outputs.
"use strict";
const fs = require("fs"), http = require("http"), path = require("path");
const [folder, modules, work, only, chromium] = process.argv.slice(2);
const cases = JSON.parse(fs.readFileSync(path.join(work, "cases.json")));
const read = (name) => { const b = fs.readFileSync(path.join(work, name)); return b.buffer.slice(b.byteOffset, b.byteOffset + b.length); };
const write = (name, array) => fs.writeFileSync(path.join(work, name), Buffer.from(array.buffer, array.byteOffset, array.byteLength));
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };

async function inNode() {
  const ort = require(path.join(modules, "onnxruntime-node"));
  const session = await ort.InferenceSession.create(path.join(folder, "model.onnx"));
  for (const { case: i, rows, columns } of cases) {
    const images = new ort.Tensor("float32", new Float32Array(read(`${i}.images`)), [1, 3, rows, columns]);
    await session.run({ images });
    const began = performance.now();
    const found = await session.run({ images });
    console.log(`node    ${columns} x ${rows}: ${Math.round(performance.now() - began)} ms`);
    write(`${i}.node`, found[session.outputNames[0]].data);
  }
}

function served(root) {
  const server = http.createServer((request, answer) => {
    const name = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const inside = name.startsWith("/node_modules/") ? path.join(modules, name.slice(14)) : path.join(root, name === "/" ? "index.html" : name);
    fs.readFile(inside, (fault, data) => {
      answer.writeHead(fault ? 404 : 200, { "Content-Type": TYPES[path.extname(inside)] || "application/octet-stream" });
      answer.end(data);
    });
  });
  return new Promise((done) => server.listen(0, "127.0.0.1", () => done(server)));
}

async function inBrowser(kind) {
  const { chromium: driver } = require(path.join(modules, "playwright-core"));
  const args = ["--no-sandbox", "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader"];
  const browser = await driver.launch({ executablePath: chromium, args });
  const server = await served(folder);
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(300000); // WebGPU on a processor takes minutes
    page.on("pageerror", (error) => console.log(`${kind}: ${error.message}`));
    await page.goto(`http://127.0.0.1:${server.address().port}/${kind === "webgpu" ? "?webgpu" : ""}`);
    if (kind === "webgpu") {
      const there = await page.evaluate(async () => {
        const adapter = navigator.gpu && (await navigator.gpu.requestAdapter());
        return adapter ? `${adapter.info.vendor} ${adapter.info.architecture}` : "";
      });
      if (!there) return console.log("webgpu  this Chromium has no adapter: not run");
      console.log(`webgpu  adapter: ${there}`);
    }
    const told = await page.evaluate(async () => { await window.ready; return document.getElementById("status").textContent; });
    console.log(`${kind.padEnd(7)} page says: ${told}`);
    for (const { case: i, height, width } of cases) {
      const pixels = Buffer.from(read(`${i}.rgba`)).toString("base64");
      const found = await page.evaluate(async ([text, h, w]) => {
        const pixels = Uint8ClampedArray.from(atob(text), (c) => c.charCodeAt(0));
        await predict(pixels, h, w);
        const { map, took } = await predict(pixels, h, w);
        return { map: Array.from(map), took };
      }, [pixels, height, width]);
      console.log(`${kind.padEnd(7)} ${width} x ${height}: ${Math.round(found.took)} ms`);
      write(`${i}.${kind}`, new Float32Array(found.map));
    }
  } finally {
    await browser.close();
    server.close();
  }
}

(async () => {
  const there = (name) => fs.existsSync(path.join(modules, name));
  const asked = (name) => only === "all" || only === name;
  if (asked("node") && there("onnxruntime-node")) await inNode();
  else if (asked("node")) console.log("node    onnxruntime-node is not installed: not run");
  for (const kind of ["wasm", "webgpu"].filter(asked)) {
    if (!chromium || !there("playwright-core") || !there("onnxruntime-web")) console.log(`${kind.padEnd(7)} no Chromium, playwright-core or onnxruntime-web: not run`);
    else await inBrowser(kind).catch((error) => console.log(`${kind.padEnd(7)} failed: ${error.message.split("\n")[0]}`));
  }
})();
