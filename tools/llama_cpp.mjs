// Asks llama.cpp about a GGUF file. Reads a JSON object from standard input and prints another one.
//
//     echo '{"model": "model.gguf", "texts": ["Once"], "ids": [2, 17], "count": 40}' | node tools/llama_cpp.mjs
//
// Needs `npm install node-llama-cpp`, in the root of the repository or in a folder above the one that
// NODE_LLAMA_CPP names. Prints the ids of the texts, with and without special tokens; `count` greedy
// tokens after `ids`; the probabilities of the next token at each of `ids`; and what the file says.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const folder = process.env.NODE_LLAMA_CPP;
const {getLlama, LlamaLogLevel} = await import(
    folder ? pathToFileURL(`${folder}/dist/index.js`).href : "node-llama-cpp"
);
const input = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: input.model});
const context = await model.createContext({contextSize: 256, sequences: 2, threads: 1});

const first = context.getSequence();
const items = input.ids.map((id) => [id, {generateNext: {probabilities: true}}]);
const rows = [];
for (const output of await first.controlledEvaluate(items)) {
    const row = new Array(model.fileInfo.metadata.tokenizer.ggml.tokens.length).fill(0);
    for (const [id, probability] of output.next.probabilities) row[id] = probability;
    rows.push(row);
}

const generated = [];
const second = context.getSequence();
for await (const id of second.evaluate(input.ids, {temperature: 0, yieldEogToken: true})) {
    generated.push(id);
    if (generated.length >= input.count) break;
}

console.log(JSON.stringify({
    text: input.texts.map((text) => model.tokenize(text, false)),
    special: input.texts.map((text) => model.tokenize(text, true)),
    generated,
    probabilities: rows,
    stops: [model.tokens.eos, model.tokens.eot],
    begins: [model.tokens.bos, model.tokens.shouldPrependBosToken],
    template: model.fileInfo.metadata.tokenizer.chat_template ?? null,
    privacy: model.fileInfo.metadata.keras_vaultgemma?.privacy ?? null,
}));
await llama.dispose();
