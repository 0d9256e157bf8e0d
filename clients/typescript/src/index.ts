/** The TypeScript client of mpt-grpc. */

export { Client } from "./client.js";
export type { CallOptions, ClientOptions, Request } from "./client.js";
export { Code, MptGrpcError } from "./errors.js";
export type { FieldViolation } from "./errors.js";
export * from "./gen/mpt/v1/text_generation_pb.js";
