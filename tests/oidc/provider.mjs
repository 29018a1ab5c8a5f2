// A real OpenID provider for the tests: signs access tokens with ES256, RS256 and EdDSA, and rotates its keys when told. Programs get
// tokens by client credentials. People log in on its pages, with any name and password: here, or by a code from another device.
//
// Commands, a line each on standard input: `rotate` puts new keys before those that are there, `retire` takes the older ones
// away. Each is answered by a line of JSON on standard output, and so is the start.

import { generateKeyPairSync, randomBytes, randomUUID } from 'node:crypto'
import { createServer } from 'node:http'
import { createInterface } from 'node:readline'

import Provider from 'oidc-provider'

const CAREFUL = 'careful' // a client whose proofs must have a nonce of the provider's
const CONSOLE = 'console' // the operators' console of a gateway
const DEVICE = 'urn:ietf:params:oauth:grant-type:device_code'
const LIVES = { person: 3600, brief: 1 } // seconds that an access token lives, by the client that people log in with

const KINDS = {
  ES256: ['ec', { namedCurve: 'P-256' }],
  RS256: ['rsa', { modulusLength: 2048 }],
  EdDSA: ['ed25519', {}],
}

function makeKeys() {
  return Object.entries(KINDS).map(([alg, [kind, options]]) => {
    const { privateKey } = generateKeyPairSync(kind, options)
    return { ...privateKey.export({ format: 'jwk' }), alg, use: 'sig', kid: randomUUID() }
  })
}

function makeProvider(issuer, keys) {
  return new Provider(issuer, {
    jwks: { keys },
    clients: [
      ...['app', CAREFUL].map((client_id) => ({
        client_id,
        client_secret: 'a secret of this test alone',
        grant_types: ['client_credentials'],
        redirect_uris: [],
        response_types: [],
        token_endpoint_auth_method: 'client_secret_post',
      })),
      {
        client_id: CONSOLE,
        application_type: 'native',
        grant_types: ['authorization_code'],
        redirect_uris: ['http://127.0.0.1/console/callback'],
        response_types: ['code'],
        token_endpoint_auth_method: 'none',
      },
      ...Object.keys(LIVES).map((client_id) => ({
        client_id,
        application_type: 'native',
        grant_types: ['authorization_code', 'refresh_token', DEVICE],
        redirect_uris: ['http://127.0.0.1/callback'],
        response_types: ['code'],
        token_endpoint_auth_method: 'none',
      })),
    ],
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: true },
      deviceFlow: { enabled: true },
      revocation: { enabled: true },
      dPoP: {
        enabled: true,
        nonceSecret: randomBytes(32),
        requireNonce: (ctx) => ctx.oidc.client?.clientId === CAREFUL,
      },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => 'urn:lacre:ES256',
        // `urn:lacre:ES256` asks for a token that is signed with ES256.
        useGrantedResource: () => true,
        getResourceServerInfo: (_ctx, resource, client) => ({
          audience: 'lacre',
          scope: client.clientId === CONSOLE ? 'lacre:console' : 'lacre:http',
          accessTokenFormat: 'jwt',
          accessTokenTTL: LIVES[client.clientId] ?? 3600,
          jwt: { sign: { alg: resource.split(':').at(-1) } },
        }),
      },
    },
    // A person's role is in the name: `reader-rita` is of the group `readers`.
    extraTokenClaims: (_ctx, { accountId }) => ({
      org: { id: 'acme' },
      realm_access: { roles: ['staff', ...(/^(reader|operator)-/.test(accountId ?? '') ? [`${accountId.split('-')[0]}s`] : [])] },
    }),
  })
}

let keys = makeKeys()
let answer
const server = createServer((request, response) => answer(request, response))

function serve() {
  answer = makeProvider(`http://127.0.0.1:${server.address().port}`, keys).callback()
  console.log(JSON.stringify({ port: server.address().port, kids: keys.map(({ kid }) => kid) }))
}

const commands = {
  rotate: () => { keys = [...makeKeys(), ...keys] },
  retire: () => { keys = keys.slice(0, Object.keys(KINDS).length) },
}

server.listen(0, '127.0.0.1', () => {
  serve()
  createInterface({ input: process.stdin }).on('line', (line) => {
    commands[line]()
    serve()
  }).on('close', () => process.exit())
})
