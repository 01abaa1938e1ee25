// The page of `distill serve` as a visitor uses it, in headless Chromium: upload, slider, colours, downloads; also at a phone's width.
//
// npm install --ignore-scripts playwright-core; distill serve --port 7860 &
// node tests/speed/serve_page.js http://127.0.0.1:7860 PHOTO OUT NODE_MODULES [CHROMIUM]
//
// Writes screenshots and the downloads to OUT, prints the page's messages, and exits with 1 if a step fails.
"use strict";
const fs = require("fs"), path = require("path");
const [address, photo, out, modules, executablePath = "/usr/bin/chromium"] = process.argv.slice(2);
const { chromium } = require(path.resolve(modules, "playwright-core"));

const must = (is, what) => { if (!is) throw new Error(what); };

(async () => {
  fs.mkdirSync(out, { recursive: true });
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  for (const width of [1280, 390]) {
    const page = await browser.newPage({ viewport: { width, height: 844 } });
    page.on("pageerror", (error) => { console.error(error.message); process.exitCode = 1; });
    await page.goto(address);
    await page.screenshot({ path: path.join(out, `empty-${width}.png`), fullPage: true });
    await page.setInputFiles("#file", photo);
    await page.waitForFunction(() => document.getElementById("more").style.display === "flex" || document.getElementById("told").className === "bad", null, { timeout: 120000 });
    console.log(width, await page.textContent("#told"));
    await page.waitForFunction(() => document.getElementById("map").complete && document.getElementById("map").naturalWidth > 0, null, { timeout: 120000 });
    const clip = () => page.evaluate(() => document.getElementById("map").style.clipPath);
    const before = await clip();
    await page.focus("#slider");
    for (let i = 0; i < 20; i++) await page.keyboard.press("ArrowLeft");
    must((await clip()) !== before, "the slider does nothing");
    await page.selectOption("#cmap", "turbo");
    await page.waitForFunction(() => document.getElementById("map").complete && document.getElementById("map").src.endsWith("turbo"));
    await page.screenshot({ path: path.join(out, `result-${width}.png`), fullPage: true });
    for (const id of ["png", "npy", "glb"]) {
      const [download] = await Promise.all([page.waitForEvent("download"), page.click(`#${id}`)]);
      const file = path.join(out, `${width}-${download.suggestedFilename()}`);
      await download.saveAs(file);
      must(fs.statSync(file).size > 100, `${id} is empty`);
    }
    const [solid] = await Promise.all([page.waitForEvent("popup"), page.click("#view")]);
    await solid.waitForTimeout(1500);
    await solid.screenshot({ path: path.join(out, `view-${width}.png`) });
    await page.setInputFiles("#file", { name: "no.jpg", mimeType: "image/jpeg", buffer: Buffer.from("no photo") });
    await page.waitForFunction(() => document.getElementById("told").className === "bad");
    console.log(width, "what is no photo:", await page.textContent("#told"));
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    must(wide <= width, `the page is ${wide} pixels wide in a window of ${width}`);
    await page.close();
  }
  await browser.close();
})().catch((error) => { console.error(error.message); process.exit(1); });
