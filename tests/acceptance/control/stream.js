// Streams one completion: node stream.js PROTO_FOLDER HOST:PORT SPEC_AS_JSON. Knows the proto files and nothing else of ours.
"use strict";
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address, spec] = process.argv.slice(2);
const definition = loader.loadSync("sps2/v1/inference_service.proto", { includeDirs: [protos], longs: String, defaults: true });
const { InferenceService } = grpc.loadPackageDefinition(definition).sps2.v1;
const client = new InferenceService(address, grpc.credentials.createInsecure(), { "grpc.enable_http_proxy": 0 });
const deadline = () => new Date(Date.now() + 60_000);

function stream(request) {
  return new Promise((resolve, reject) => {
    const answer = { text: "", tokenIds: [], numEvents: 0, finish: null, usage: null };
    const call = client.StreamGenerateText({ spec: request }, { deadline: deadline() });
    call.on("data", (event) => {
      if (Number(event.sequenceNumber) !== answer.numEvents) reject(new Error("a gap in the events"));
      answer.numEvents += 1;
      if (event.delta) {
        answer.text += event.delta.text;
        answer.tokenIds.push(...event.delta.tokenIds);
      }
      answer.finish = event.finish ?? answer.finish;
      answer.usage = event.usage ?? answer.usage;
    });
    call.on("error", reject);
    call.on("end", () => resolve(answer));
  });
}

async function main() {
  const answer = await stream(JSON.parse(spec));
  if (answer.finish?.tokenCount !== answer.tokenIds.length || !answer.usage) throw new Error("it is not complete");
  const refused = await stream({ text: "" }).then(() => null, (error) => error);
  if (refused?.code !== grpc.status.INVALID_ARGUMENT) throw new Error(`not refused: ${refused}`);
  const badField = /^(\S+): /.exec(refused.details)[1];
  process.stdout.write(JSON.stringify({ ...answer, badField, node: process.version }) + "\n");
  client.close();
}

main().catch((error) => {
  process.stderr.write(`${error}\n`);
  process.exit(1);
});
