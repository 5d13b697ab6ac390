// Says which expert the pointer is at, and what is known of it. Without it the page is whole.
"use strict";
const blocks = JSON.parse(document.getElementById("blocks").textContent);
for (const picture of document.querySelectorAll("figure.heat svg")) {
  const output = picture.closest("figure").querySelector("output"), place = picture.dataset;
  picture.addEventListener("pointermove", (event) => {
    const scale = picture.viewBox.baseVal.width / picture.clientWidth, box = picture.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) * scale - place.left) / place.cell);
    const block = blocks[Math.floor(((event.clientY - box.top) * scale - place.top) / place.row)];
    if (!block || !(expert >= 0 && expert < block.widths.length)) { output.textContent = ""; return; }
    const kept = block.widths[expert], share = Math.round(100 * kept / block.width);
    const tokens = block.tokens ? `, ${block.tokens[expert].toLocaleString("en")} calibration tokens` : "";
    output.textContent = `${block.path}, expert ${expert}: ${kept} of ${block.width} kept (${share} %)${tokens}`;
  });
  picture.addEventListener("pointerleave", () => { output.textContent = ""; });
}
