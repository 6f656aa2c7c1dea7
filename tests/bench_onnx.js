// bench_onnx.js - evaluations of the score network in ONNX Runtime, for bench_peer.sh.
//
//     NODE_PATH=DIR/node_modules node bench_onnx.js NETWORK THREADS STEPS
//
// NETWORK.onnx and NETWORK.safetensors are what `reference.py export` writes: the network, and an example of
// images z, times t and the output for them, which ONNX Runtime must find too. Sampling is STEPS evaluations;
// the little that a sampler does between them is left out.

"use strict";
const fs = require("fs");
const ort = require("onnxruntime-node");

function readTensors(path) {
    const file = fs.readFileSync(path);
    const start = 8 + Number(file.readBigUInt64LE(0));
    const tensors = {};
    for (const [name, entry] of Object.entries(JSON.parse(file.toString("utf8", 8, start)))) {
        const [begin, end] = entry.data_offsets.map((offset) => file.byteOffset + start + offset);
        const values = new Float32Array(file.buffer.slice(begin, end));
        tensors[name] = new ort.Tensor("float32", values, entry.shape);
    }
    return tensors;
}

async function main(network, threads, steps) {
    const {z, t, out} = readTensors(network + ".safetensors");
    const session = await ort.InferenceSession.create(network + ".onnx", {
        executionProviders: ["cpu"],
        graphOptimizationLevel: "all",
        executionMode: "sequential",
        intraOpNumThreads: threads,
        interOpNumThreads: 1,
    });
    const found = (await session.run({z, t})).out.data;   // also the one to warm up
    const error = found.reduce((most, value, i) => Math.max(most, Math.abs(value - out.data[i])), 0);
    if (found.length !== out.data.length || !(error < 1e-4)) {
        throw new Error(`the output of ${network} differs from PyTorch's by ${error}`);
    }
    const begin = process.hrtime.bigint();
    for (let step = 0; step < steps; step++) {
        await session.run({z, t});
    }
    const seconds = Number(process.hrtime.bigint() - begin) / 1e9;
    const peak = 1024 * process.resourceUsage().maxRSS;
    console.log(`onnx vdm-4 sampling seconds=${seconds.toFixed(5)} threads=${threads} count=${z.dims[0]} ` +
        `steps=${steps} peak_bytes=${peak} error=${error.toExponential(1)} version=${ort.env.versions.node}`);
}

main(process.argv[2], Number(process.argv[3]), Number(process.argv[4])).catch((error) => {
    console.error("bench_onnx.js: " + error.message);
    process.exit(1);
});
