{{/* What things are called, and how they are told apart. */}}

{{/* A Service's name begins with a letter and has no dot (RFC 1035); a release may be called 123, or pr.7. */}}
{{- define "lacre.fullname" -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $release) -}}
{{- printf "lacre-%s" $release | trunc 40 | trimSuffix "-" -}}
{{- else if contains "lacre" $release -}}
{{- $release | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-lacre" $release | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* (list $ "component"): what selects a component's pods. */}}
{{- define "lacre.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: lacre
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 | quote }}
{{- with (slice . 2) }}
lacre/pool: {{ index . 0 | quote }}
{{- end }}
{{- end -}}

{{/* (list $ "component"): the labels of a component's things; a pool's workers add its name. */}}
{{- define "lacre.labels" -}}
{{- $root := index . 0 -}}
{{ include "lacre.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | quote }}
{{- end -}}

{{/* (list $ "repository"): an image of this project. */}}
{{- define "lacre.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end -}}

{{/* NATS' image: below image.registry, unless its name begins with a registry of its own. */}}
{{- define "lacre.nats.image" -}}
{{- $image := .Values.nats.image -}}
{{- $first := splitList "/" $image | first -}}
{{- if and .Values.image.registry (not (and (contains "/" $image) (regexMatch "[.:]|^localhost$" $first))) -}}
{{ trimSuffix "/" .Values.image.registry }}/
{{- end -}}
{{ $image }}
{{- end -}}

{{/* Each pool with all that it has, as YAML: what it does not say itself is as `workers` says. */}}
{{- define "lacre.pools" -}}
{{- $root := . -}}
{{- $named := list -}}
{{- range $name, $own := .Values.pools }}{{ if not (kindIs "invalid" $own) }}{{ $named = append $named $name }}{{ end }}{{ end -}}
{{- if not $named }}{{ fail "pools: name at least one, such as pools: {default: {}}" }}{{ end -}}
{{- range $name, $own := .Values.pools }}
{{- if not (kindIs "invalid" $own) }}
{{- $pool := mustMergeOverwrite (deepCopy $root.Values.workers) (deepCopy $own) }}
{{- if and $own.upstream $own.models }}{{ fail (printf "pools.%s: it has either models or an upstream" $name) }}{{ end }}
{{- if $pool.upstream }}{{ $_ := set $pool "models" list }}{{ $_ := set $pool "digests" ($own.digests | default dict) }}{{ end }}
{{- with $own.modelsVolume }}{{ $_ := set $pool "modelsVolume" . }}{{ end }}
{{- $_ := set $pool "secret" ($pool.secret | default (printf "lacre-pool-%s" $name)) }}
{{- $_ := set $pool "keysSecret" ($pool.keysSecret | default (printf "lacre-pool-%s-keys" $name)) }}
{{ $name | quote }}:
{{ toYaml $pool | indent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lacre.nats.url" -}}
{{- if .Values.nats.enabled -}}
tls://{{ include "lacre.fullname" . }}-nats.{{ .Release.Namespace }}.svc:4222
{{- else -}}
{{ required "nats.external.url: the address of your NATS, or enable nats" .Values.nats.external.url }}
{{- end -}}
{{- end -}}

{{/* The region of gateways and workers. */}}
{{- define "lacre.nats.region" -}}
{{- if .Values.nats.enabled }}lacre{{ else }}{{ .Values.nats.external.region }}{{ end -}}
{{- end }}

{{- define "lacre.nats.port" -}}
{{- if .Values.nats.enabled -}}4222{{- else -}}
{{- $host := (urlParse .Values.nats.external.url).host -}}
{{- if contains ":" $host }}{{ splitList ":" $host | last }}{{ else }}4222{{ end -}}
{{- end -}}
{{- end -}}

{{/* The Secret with the authority of NATS' certificates; empty for the system's. */}}
{{- define "lacre.nats.ca" -}}
{{- if .Values.nats.enabled }}{{ .Values.nats.tlsSecret }}{{ else }}{{ .Values.nats.external.caSecret }}{{ end -}}
{{- end -}}

{{/* The servers as the signer's site.json has them: an address, and the file of NATS' authority. */}}
{{- define "lacre.nats.servers" -}}
url: {{ include "lacre.nats.url" . | quote }}
{{- if include "lacre.nats.ca" . }}
ca: /etc/lacre/nats-ca/ca.crt
{{- end }}
{{- end -}}

{{/* `[nats]` of gateway.toml and worker.toml. */}}
{{- define "lacre.nats" -}}
{{ include "lacre.nats.servers" . }}
region: {{ include "lacre.nats.region" . | quote }}
credentials: /etc/lacre/secret/nats.json
{{- end -}}

{{/* (list VALUE "message"): a list as YAML. An empty one is a mistake, which `required` would let pass. */}}
{{- define "lacre.some" -}}
{{- if not (index . 0) }}{{ fail (index . 1) }}{{ end -}}
{{ toYaml (index . 0) }}
{{- end -}}
